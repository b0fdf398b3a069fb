"""A backbone that can be asked: its answers are the decoder's own, and its files give them back."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import assert_same_bits, random_model
from language_cases import decoder_config, fresh_decoder, random_language_model

import omnistream_jax
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.qwen3 import save_decoder
from omnistream_jax.data.boxes import format_box, parse_boxes, restore_boxes
from omnistream_jax.data.captions import letterbox
from omnistream_jax.language_model import CONFIG_NAME, PROJECTOR_NAME, LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIDE, TOKENS = 32, 6
QUESTIONS = ["Describe the image.", "What colour is the cube that is to the left of the red ball?"]


@pytest.fixture(scope="module")
def model():
    return random_language_model(random_model(), decoder_config(), SIDE)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def said(model, pictures):
    return model.answer(pictures, QUESTIONS, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model.save(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


class Echo(LanguageModel):
    """Says what it is asked."""

    def answer_features(self, patches, instructions, **options):
        return [f"{text} {list(patches.shape)}" for text in instructions]


def echo(model) -> Echo:
    return Echo(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


# Answers


def test_an_answer_is_the_decoders_likeliest_text_behind_the_picture_alone(model, pictures, said):
    """Token by token, without cache, batch or padding on the left."""
    rows = 64
    decoder, params = model.decoder, {"params": model.params["decoder"]}

    @jax.jit
    def logits(embeddings, length):
        place = jnp.arange(rows)[None]
        hidden = decoder.apply(params, embeddings, place, (place < length).astype(jnp.int32))
        return decoder.apply(params, hidden[0, length - 1], method="logits")

    for picture, question, text in zip(pictures, QUESTIONS, said, strict=True):
        patches = model.model.encode(picture[None, None], layers=()).patches.reshape(1, -1, 32)
        visual = model.projector.apply({"params": model.params["projector"]}, patches)
        row, answer = np.zeros((1, rows, 24), np.float32), []
        row[:, :4] = visual
        prompt = model.chat.prompt(question)
        length = 4 + len(prompt)
        row[:, 4:length] = decoder.apply(params, jnp.array([prompt]), method="embed")
        for _ in range(TOKENS):
            answer.append(int(logits(row, length).argmax()))
            row[:, length] = decoder.apply(params, jnp.array([answer[-1:]]), method="embed")[0]
            length += 1
        assert text == model.chat.decode(answer)
        assert text != ""


def test_answers_depend_on_the_picture_and_on_the_question(model, pictures, said):
    assert model.answer(pictures[::-1], QUESTIONS, max_tokens=TOKENS) != said
    assert model.answer(pictures, QUESTIONS[::-1], max_tokens=TOKENS) != said[::-1]


def test_draws_are_those_of_their_seed(model, pictures):
    drawn = [model.answer(pictures, QUESTIONS, max_tokens=TOKENS, temperature=2.0, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_frames_of_a_clip_stand_before_the_text(model, pictures):
    patches = model.model.encode(pictures[None], layers=()).patches
    embeddings, lengths = model.prompts(patches, QUESTIONS[:1])
    assert lengths.tolist() == [2 * 4 + len(model.chat.prompt(QUESTIONS[0]))]
    visual = model.projector.apply({"params": model.params["projector"]}, patches.reshape(1, 8, 32))
    np.testing.assert_allclose(embeddings[:, :8], visual, rtol=1e-5, atol=1e-5)
    assert model.answer(pictures[None], QUESTIONS[:1], max_tokens=TOKENS) == model.answer_features(
        patches, QUESTIONS[:1], max_tokens=TOKENS
    )


@pytest.mark.parametrize("shape", [(8, 32), (1, 2, 2, 32), (1, 2, 2, 2, 16), (1, 0, 2, 2, 32)])
def test_patches_that_are_not_of_clips_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"patches: expected \[B, T, h, w, 32\], got \["):
        model.answer_features(np.zeros(shape, np.float32), QUESTIONS[:1], max_tokens=TOKENS)


def test_pictures_of_other_shapes_are_laid_into_the_square_and_boxes_follow(model):
    wide = np.random.default_rng(2).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    box = (0.1, 0.2, 0.5, 0.9)
    (text,) = echo(model).answer([wide], [f"What is in {format_box(box)}?"])
    np.testing.assert_allclose(parse_boxes(text)[0].corners, box, atol=0.004)
    assert text.endswith("[1, 1, 2, 2, 32]")
    square, shown = letterbox(wide, SIDE)
    assert shown == (1.0, 13 / 32)
    whole = model.answer([wide], QUESTIONS[:1], max_tokens=TOKENS)
    assert whole == model.answer(square[None], QUESTIONS[:1], max_tokens=TOKENS)


def test_boxes_beside_the_picture_end_at_its_border_and_broken_ones_stay():
    assert restore_boxes("a <|box_start|>(100,50),(200,900)<|box_end|>", (1.0, 0.5)) == (
        "a <|box_start|>(100,101),(200,999)<|box_end|>"
    )
    broken = "a <|box_start|>(100,50),(200<|box_end|>"
    assert restore_boxes(broken, (1.0, 0.5)) == broken


# Bad input


@pytest.mark.parametrize(
    ("images", "instructions", "message"),
    [
        (np.zeros((1, SIDE, SIDE, 3), np.uint8), [""], "instruction: '', expected a text"),
        (np.zeros((1, SIDE, SIDE, 3), np.uint8), ["a <|im_end|>"], r"instruction: .* holds <\|im_end\|>"),
        (
            np.zeros((1, SIDE, SIDE, 3), np.uint8),
            ["What is in <|box_start|>(1,2)<|box_end|>?"],
            r"instructions: 'What is in .*' holds a box that is not written as one",
        ),
        (np.zeros((1, SIDE, SIDE, 3), np.uint8), "Describe", "instructions: expected a list of 1 texts"),
        (np.zeros((1, SIDE, SIDE, 3), np.uint8), ["a", "b"], "instructions: expected a list of 1 texts"),
        (
            np.zeros((1, SIDE, SIDE, 3), np.uint8),
            ["a " * 40_960],
            "4 visual tokens and a prompt of .* are too long, expected fewer than 40960",
        ),
        (np.zeros((1, SIDE, SIDE, 3), np.float32), ["a"], r"images: expected uint8 .*, got float32\[1, 32, 32, 3\]"),
        (np.zeros((SIDE, SIDE, 3), np.uint8), ["a"] * SIDE, "images: expected uint8 pictures"),
        ([np.zeros((frames, 16, 16, 3), np.uint8) for frames in (2, 1)], ["a"] * 2, r"frames in each, got \[2, 1\]"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(model, images, instructions, message):
    with pytest.raises(ValueError, match=message):
        model.answer(images, instructions, max_tokens=TOKENS)


# Files


def test_load_gives_back_what_save_wrote_and_says_the_same(model, saved, pictures, said, tmp_path):
    loaded = omnistream_jax.load_language(saved)
    assert_same_bits(loaded.params, model.params)
    assert_same_bits(loaded.model.params, model.model.params)
    assert loaded.answer(pictures, QUESTIONS, max_tokens=TOKENS) == said
    loaded.save(tmp_path / "again")
    names = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    assert names == [
        *("config.json", "decoder/config.json", "decoder/generation_config.json", "decoder/model.safetensors"),
        *("decoder/tokenizer.json", "decoder/tokenizer_config.json", "language.json"),
        *("model.safetensors", "projector.safetensors"),
    ]
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_backbone_alone_is_refused(copied):
    (copied / CONFIG_NAME).unlink()
    with pytest.raises(WeightsError, match=rf"a backbone without a decoder, expected {CONFIG_NAME}"):
        omnistream_jax.load_language(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": 40}, "size: expected a multiple of 16, got 40"),
        ({"size": "32"}, "size: expected a multiple of 16, got '32'"),
        ({"side": 32}, r"expected the key 'size', got \['side'\]"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(copied, content, message):
    (copied / CONFIG_NAME).write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"{CONFIG_NAME}: {message}"):
        omnistream_jax.load_language(copied)


@pytest.mark.parametrize("name", [PROJECTOR_NAME, "decoder/config.json", "decoder/tokenizer.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(WeightsError, match=name):
        omnistream_jax.load_language(copied)


def test_a_missing_decoder_is_named(copied):
    shutil.rmtree(copied / "decoder")
    with pytest.raises(WeightsError, match="decoder: no such directory"):
        omnistream_jax.load_language(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, rf"{PROJECTOR_NAME}: .*mlp_0/kernel is float32\[32,24\], expected shape \[32, 16\]"),
        ({"vocabulary_size": 100}, "tokenizer.json has tokens up to .* less than the decoder's vocabulary of 100"),
    ],
)
def test_a_decoder_of_another_size_is_one_clear_error(copied, changes, message):
    config = decoder_config(**changes)
    save_decoder(copied / "decoder", config, fresh_decoder(config))
    with pytest.raises(WeightsError, match=message):
        omnistream_jax.load_language(copied)
