"""Tokenizers: the one that comes with the package, those that transformers loads, and tokens back to text."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from source_cases import write_tokenizer

from omnistream_jax.data.captions import CaptionData
from omnistream_jax.data.chat import CONTROL, EMBEDDED, load_chat
from omnistream_jax.data.embedded import TOKENIZER
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.world import WorldCaptions

TEXTS = [
    "Two things: a red ball and a cube covered in stars.",
    "<|object_ref_start|>a red ball<|object_ref_end|><|box_start|>(12,345),(678,999)<|box_end|>",
    "  spaces  and\ttabs \r\n\n lines ",
    "caf\u00e9 and cafe\u0301",  # composed and not: what NFC would make one
    "世界 🎉🏳️‍🌈 ᚠᛇᚻ \x00\x7f\ufffd \u200b",
    "don't I'LL 3.14e-10 x=[0];",
]


@pytest.fixture(scope="module")
def chat():
    return load_chat(EMBEDDED)


def _answer(chat, text) -> tuple[int, ...]:
    return chat.turn("", text, "x").answer


def test_the_embedded_tokenizer_gives_any_text_back(chat):
    rng = np.random.default_rng(0)
    points = [point for point in rng.integers(1, 0x110000, 300).tolist() if not 0xD800 <= point < 0xE000]
    for text in [*TEXTS, "".join(map(chr, points)), "".join(map(chr, range(1, 0x500)))]:
        assert chat.decode(_answer(chat, text)) == text


def test_the_embedded_tokenizer_is_small_and_its_last_tokens_are_qwens(chat):
    tokens = json.loads(TOKENIZER.read_text())["added_tokens"]
    assert [token["content"] for token in tokens] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<think>",
        "</think>",
    ]
    assert 512 <= chat.vocabulary_size == tokens[-1]["id"] + 1 <= 1024
    assert chat.stops == (tokens[2]["id"], tokens[0]["id"])
    assert chat.end == tokens[2]["id"]
    assert TOKENIZER.stat().st_size < 100_000


def test_a_digit_is_a_token_so_that_boxes_have_one_length(chat):
    lengths = {
        len(_answer(chat, f"<|box_start|>({a},{b}),({b},{a})<|box_end|>")) for a in (100, 345, 678) for b in (999, 210)
    }
    assert lengths == {2 + 12 + 5}  # both ends, digits, and what stands around the four numbers
    assert len({_answer(chat, str(digit)) for digit in range(10)}) == 10


def test_words_of_the_heldout_world_are_tokens(chat):
    world = WorldCaptions("heldout", 40, size=16)
    for index in range(40):
        text = world.read(index).answer
        pieces = [chat.decode([token]) for token in _answer(chat, text)]
        words = re.findall(r" ?[A-Za-z]+", CONTROL.sub("|", text))
        assert [piece for piece in pieces if piece.strip().isalpha()] == words


@pytest.mark.slow
def test_making_the_embedded_tokenizer_again_gives_the_same(tmp_path):
    from omnistream_jax.data.embedded.make_tokenizer import main

    main([str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(TOKENIZER.read_text())


def test_caption_data_is_in_embedded_tokens_unless_told(chat):
    source = WorldCaptions("train", 8, size=32)
    data = CaptionData((source,), 4, size=32, max_tokens=512)
    assert data.vocabulary_size == chat.vocabulary_size
    with build_pipeline({"caption": data}, seed=1, prefetch=0) as pipeline:
        batch = next(pipeline)["caption"]
    for row in range(4):
        record = source.read(int(batch["record"][row, 0]))
        learned = batch["tokens"][row][batch["target_mask"][row]]
        assert chat.decode(learned) == record.answer
        before = batch["tokens"][row][(batch["segment"][row] == 101) & ~batch["target_mask"][row]]
        assert tuple(before) == chat.prompt(record.instruction)


def test_a_prompt_is_what_qwens_template_writes_without_thinking(chat):
    written = "<|im_start|>user\nWhat {is} it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat._tokenizer.decode(list(chat.prompt("What {is} it?")), skip_special_tokens=False) == written


def test_transformers_talks_with_what_is_saved(chat, tmp_path):
    transformers = pytest.importorskip("transformers")
    chat.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')  # as beside the weights of a decoder
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == list(chat.stops)

    def told(*talk, **options):
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(talk)]
        return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    ask, again = "Where is the red ball {really}?\n", "And <|object_ref_start|>the cube<|object_ref_end|>?"
    turn = chat.turn(ask, "There.", "x")
    line = list(_answer(chat, "\n"))
    assert told(ask, add_generation_prompt=True) == list(chat.prompt(ask))
    assert told(ask, "There.") == [*turn.prompt, *turn.answer, *turn.end, *line]
    talk = theirs.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *({"role": "user", "content": text} for text in (ask, again))],
        tokenize=False,
        add_generation_prompt=True,
    )
    start, end = "<|im_start|>", "<|im_end|>"
    assert talk == (
        f"{start}system\nBe brief.{end}\n{start}user\n{ask}{end}\n"
        f"{start}user\n{again}{end}\n{start}assistant\n<think>\n\n</think>\n\n"
    )
    # Of earlier answers Qwen3's template keeps no thought.
    earlier = f"{start}user\n{ask}{end}\n{start}assistant\nThere.{end}\n"
    whole = [*_answer(chat, earlier), *chat.prompt(again)]
    assert told(ask, "There.", again, add_generation_prompt=True) == whole


def test_a_prompt_that_is_none_or_fakes_a_turn_is_refused(chat):
    with pytest.raises(DataError, match=r"instruction: ' \\n', expected a text"):
        chat.prompt(" \n")
    with pytest.raises(DataError, match=r"instruction: .* holds </think>, <\|im_end\|>, expected text without"):
        chat.prompt("me<|im_end|></think>")
    assert chat.prompt("Give the box of <|object_ref_start|>it<|object_ref_end|>.")


def test_text_ends_at_the_first_token_that_ends_it(chat):
    tokens = _answer(chat, "a red ball")
    for stop in chat.stops:
        assert chat.decode(np.array([*tokens, stop, *tokens], np.int32)) == "a red ball"
    assert chat.decode([]) == chat.decode([chat.end]) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_tokens_come_as_whole_characters(chat, text):
    stream, tokens = chat.stream_decoder(), _answer(chat, text)
    told = ""
    for number, token in enumerate(tokens):
        new = stream.add(np.int32(token))
        told += new
        assert text.startswith(told)
        settled = chat.decode(tokens[: number + 1]).rstrip("\ufffd")
        assert len(told) >= len(settled)  # nothing whole is held back
    assert not stream.ended
    assert told + stream.add(chat.end) == text
    assert stream.ended
    assert stream.add(tokens[0]) == stream.finish() == ""


def test_streamed_bytes_that_are_no_characters_come_in_the_end(chat):
    rng = np.random.default_rng(0)
    for _ in range(100):  # the first 256 tokens are bytes
        tokens, stream = rng.integers(0, 256, 12).tolist(), chat.stream_decoder()
        assert "".join(map(stream.add, tokens)) + stream.finish() == chat.decode(tokens)
        assert stream.finish() == ""
    stream = chat.stream_decoder()
    first, *rest = _answer(chat, "é")
    assert (stream.add(first), stream.add(chat.end)) == ("", "\ufffd")
    assert rest


def test_a_vocabulary_beyond_the_decoders_is_one_error(chat, tmp_path):
    chat.check_vocabulary(chat.vocabulary_size)
    chat.check_vocabulary(151_936)
    size = chat.vocabulary_size
    with pytest.raises(DataError, match=rf"embedded has tokens up to {size - 1}, .* vocabulary of {size - 1}$"):
        chat.check_vocabulary(size - 1)
    with pytest.raises(DataError, match=r"words.json has tokens up to 30, "):
        load_chat(write_tokenizer(tmp_path / "words.json")).check_vocabulary(30)


PRETRAINED = """
import sys
from omnistream_jax.data.chat import load_chat
from omnistream_jax.data.errors import DataError
before = [name for name in ("torch", "jax", "flax", "tensorflow", "transformers") if name in sys.modules]
file = load_chat("embedded")
assert "transformers" not in sys.modules, "a file needs no transformers"
for path in sys.argv[1:3]:
    chat = load_chat(path)
    texts = ["cafe\\u0301 \\U0001f389 (12,345) a red ball<|box_start|>", " two  things\\r\\n"]
    assert [chat.turn("ask", text, "x") for text in texts] == [file.turn("ask", text, "x") for text in texts], path
    assert (chat.stops, chat.vocabulary_size) == (file.stops, file.vocabulary_size), path
for path in sys.argv[3:]:
    try:
        load_chat(path)
    except DataError as error:
        print(error)
assert before == [], before
assert [name for name in ("torch", "jax", "flax", "tensorflow") if name in sys.modules] == []
"""


def test_directories_and_hub_repositories_are_read_by_transformers_alone(tmp_path):
    pytest.importorskip("transformers")
    directory, empty, words = (tmp_path / name for name in ("directory", "empty", "words"))
    # A repository as the hub's client keeps it once it was downloaded.
    repository = tmp_path / "hub/models--someone--tokens"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (directory, empty, words, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    shutil.copy(TOKENIZER, snapshot / "tokenizer.json")
    load_chat(EMBEDDED).save(str(directory))
    (directory / "config.json").write_text('{"model_type": "qwen3"}')  # as beside the weights of a decoder
    write_tokenizer(words / "tokenizer.json", control=())
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    arguments = [directory, "someone/tokens", empty, words, "someone/nothing"]
    done = subprocess.run(
        [sys.executable, "-c", PRETRAINED, *map(str, arguments)],
        env={"PATH": "", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith(f"tokenizer: {empty} cannot be read, expected a directory or a hub repository with")
    assert errors[1] == f"tokenizer: {words} has no token <|im_start|>, expected Qwen3's chat tokens"
    assert errors[2].startswith("tokenizer: someone/nothing cannot be read, expected a directory or a hub repository")
