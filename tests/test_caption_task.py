"""L_cap: rows of several captions cost what the captions cost alone, and the backbone learns from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from scipy.special import erf, logsumexp
from training_cases import small_config

from omnistream_jax import train as train_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.qwen3 import save_decoder
from omnistream_jax.data.chat import load_chat
from omnistream_jax.models.projector import Projector
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, init_decoder
from omnistream_jax.ops.rope import random_scale
from omnistream_jax.optim import Optimizer, TeacherSchedule
from omnistream_jax.step import init_state, make_accumulate, make_update
from omnistream_jax.tasks.caption import CaptionTask
from omnistream_jax.tasks.task import Teachers

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = Qwen3Config(vocabulary_size=40, width=24, depth=2, heads=4, kv_heads=2, head_width=8, hidden=32)
SIDE, PER_IMAGE, ROOM = 32, 4, 18
# (segment, prompt, answer); a row of texts about two images each with room left, and one with two about the first.
TEXTS = (
    ((101, (3, 4, 5, 6), (7, 8, 9)), (201, (3, 4), (10, 2))),
    ((101, (3, 11, 12), (13, 14, 15, 2)), (102, (3, 4), (17, 2)), (201, (3, 4, 5, 5, 5), (16, 2))),
)
TEACHERS = Teachers(jnp.zeros((), jnp.int32), {}, None)


@pytest.fixture(scope="module")
def task():
    backbone = random_model().backbone
    # Kernels and an embedding (below) so large that attention is far from an average and tokens differ.
    parts = (backbone, Projector(SIZES.width), Qwen3(SIZES))
    return CaptionTask("caption", 1.0, None, *parts, chunk=5, kernel_std=0.3, rope_jitter=1.0)


@pytest.fixture(scope="module")
def params(task):
    keys = dict(zip(task.heads, jax.random.split(jax.random.key(0)), strict=True))
    heads = {name: jax.jit(init)(keys[name]) for name, init in task.heads.items()}
    heads["decoder"]["embedding"] *= 10
    return {"backbone": random_model().params, **heads}


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (2, 2, SIDE, SIDE, 3), dtype=np.uint8)
    arrays = {name: np.zeros((2, ROOM), np.int32) for name in ("tokens", "segment", "position")}
    arrays |= {"target_mask": np.zeros((2, ROOM), bool), "image": images, "cut": np.array([[True, False], [0, 0]])}
    for row, texts in enumerate(TEXTS):
        start = 0
        for segment, prompt, answer in texts:
            stop = start + len(prompt) + len(answer)
            arrays["tokens"][row, start:stop] = prompt + answer
            arrays["segment"][row, start:stop] = segment
            arrays["position"][row, start:stop] = np.arange(stop - start)
            arrays["target_mask"][row, start + len(prompt) : stop] = True
            start = stop
    arrays["texts"] = np.array([[1, 1], [2, 1]], np.int32)
    assert arrays["segment"].min(1).tolist() == [0, 101], "one row ends with padding"
    return arrays


@pytest.fixture(scope="module")
def loss(task):
    program = jax.jit(lambda params, batch: task.loss(params, TEACHERS, batch, jax.random.key(0)))
    return lambda params, batch: jax.tree.map(float, program(params, batch))


def project(params, patches):
    """The projector once more, in NumPy."""
    first, second = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"mlp_{i}"]) for i in range(2))
    hidden = patches @ first["kernel"] + first["bias"]
    return 0.5 * hidden * (1 + erf(hidden / np.sqrt(2))) @ second["kernel"] + second["bias"]


@functools.partial(jax.jit, static_argnums=0)
def patches_of(task, params, images, rope_scale=(1.0, 1.0)):
    backbone = {"params": params["backbone"]}
    return task.backbone.apply(backbone, images[:, None], layers=(), rope_scale=rope_scale).patches


@functools.partial(jax.jit, static_argnums=0)
def logits_of(task, params, visual, text):
    """Of visual tokens [P, D] and a text [L] in a row of their own: [P + L, V]."""
    decoder = {"params": params["decoder"]}
    text = task.decoder.apply(decoder, text[None], method="embed")
    embeddings = jnp.concatenate([visual[None], text], axis=1)
    place = jnp.arange(embeddings.shape[1])[None]
    hidden = task.decoder.apply(decoder, embeddings, place, jnp.ones_like(place))
    return task.decoder.apply(decoder, hidden[0], method="logits")


def caption_alone(task, params, patches, prompt, answer) -> list[tuple[float, bool]]:
    """Of each token of an answer behind its image and prompt: its cross-entropy, and whether it is the likeliest."""
    visual = project(params["projector"], np.asarray(patches, np.float64).reshape(PER_IMAGE, -1))
    logits = logits_of(task, params, visual.astype(np.float32), np.array(prompt + answer))
    before = np.asarray(logits, np.float64)[PER_IMAGE + len(prompt) - 1 : -1]
    return [(logsumexp(row) - row[token], row.argmax() == token) for row, token in zip(before, answer, strict=True)]


def costs_and_hits(task, params, batch, rope_scale=(1.0, 1.0)):
    told = []
    for images, texts in zip(batch["image"], TEXTS, strict=True):
        patches = patches_of(task, params, images, rope_scale)
        for segment, prompt, answer in texts:
            told += caption_alone(task, params, patches[segment // 100 - 1], prompt, answer)
    assert len(told) == 13
    return map(np.array, zip(*told, strict=True))


def test_positions_in_pictures_are_jittered(task, params, batch):
    key = jax.random.key(5)
    jittered = dataclasses.replace(task, rope_jitter=2.0)
    found = jax.jit(lambda params, batch: jittered.loss(params, TEACHERS, batch, key)[0])(params, batch)
    costs, _ = costs_and_hits(task, params, batch, random_scale(key, 2.0))
    as_they_are, _ = costs_and_hits(task, params, batch)
    assert found == pytest.approx(costs.mean(), rel=1e-5)
    assert found != pytest.approx(as_they_are.mean(), rel=1e-4)


def test_texts_in_a_row_cost_what_each_costs_alone_with_its_image(task, params, batch, loss):
    costs, hits = costs_and_hits(task, params, batch)
    assert costs.std() > 0.1, "tokens must differ for a mistake to show"
    found, metrics = loss(params, batch)
    assert found == pytest.approx(costs.mean(), rel=1e-5)
    told = {"caption": found, "token_accuracy": pytest.approx(hits.mean())}
    assert metrics == {**told, "answers_cut": 0.25, "texts_per_image": 1.25}


def test_what_stands_in_the_padding_has_no_influence(params, batch, loss):
    tokens = np.where(batch["segment"] == 0, 33, batch["tokens"])
    position = np.where(batch["segment"] == 0, 7, batch["position"])
    assert loss(params, {**batch, "tokens": tokens, "position": position}) == loss(params, batch)


def test_images_change_the_cost_of_their_own_text_alone(params, batch, loss):
    def of_texts(changed, row, number):
        only = (changed["segment"] // 100 == number) & (np.arange(2) == row)[:, None]
        return loss(params, {**changed, "target_mask": batch["target_mask"] & only})[0]

    other = {**batch, "image": batch["image"].copy()}
    other["image"][0, 1] = 255 - other["image"][0, 1]
    for row, number in np.ndindex(2, 2):
        before, after = (of_texts(arrays, row, number + 1) for arrays in (batch, other))
        assert (abs(after - before) > 1e-3) == ((row, number) == (0, 1))


def test_the_first_token_of_a_text_is_never_learned(params, batch, loss):
    mask = batch["target_mask"].copy()
    mask[:, 0] = True
    mask[0, len(sum(TEXTS[0][0][1:], ()))] = True
    assert loss(params, {**batch, "target_mask": mask}) == loss(params, batch)


def test_gradients_reach_every_part_of_the_backbone_that_an_image_has(task, params, batch):
    state = init_state(params, [task], _optimizer(), None)
    gradients, _ = make_accumulate(task, seed=0)(state, jax.tree.map(jnp.zeros_like, params), batch)
    still = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(leaf).max() > 0
    }
    # Nothing is masked and there is no camera token.
    assert still == {f"backbone/{name}" for name in ("mask_token", "camera_tokens", "aspect_kernel", "aspect_bias")}


def _optimizer(**fields) -> Optimizer:
    constant = {"peak": 0.01, "warmup_steps": 0, "steps": 10, "final": 0.01, "beta1": 0.9, "beta2": 0.999}
    return Optimizer(**constant, clip_norm=1.0, freeze_prototypes_steps=0, **fields)


def test_a_factor_of_zero_freezes_the_backbone_bit_for_bit(task, params, batch):
    optimizer = _optimizer(factors=(("backbone", 0.0),))
    optimizer.check_factors(params)
    state = init_state(jax.tree.map(jnp.copy, params), [task], optimizer, None)
    accumulate, update = make_accumulate(task, seed=0), make_update(optimizer, TeacherSchedule((1.0, 1.0)))
    gradients, losses = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(3):
        gradients, metrics = accumulate(state, gradients, batch)
        losses.append(float(metrics["loss"]))
        state, gradients, _ = update(state, gradients, [metrics["loss"]])
    assert losses[2] < losses[0]
    for name, tree in params.items():
        same = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (tree, state.params[name])), strict=True)]
        assert all(same) if name == "backbone" else not any(same), name


# From a config.


def captions_only(**overrides):
    weights = {f"tasks__{name}__weight": 0.0 for name in ("image_ssl", "clip_ssl")} | {"tasks__caption__weight": 1.0}
    return small_config(**weights, self_supervision__gram__weight=0.0, **overrides)


def test_the_decoder_and_its_tokenizer_are_read_from_a_directory(tmp_path):
    fresh = train_lib.build(captions_only(seed=5))
    (task,) = fresh.tasks
    save_decoder(tmp_path, task.decoder.config, fresh.state.params["decoder"])
    load_chat("embedded").save(tmp_path)
    built = train_lib.build(captions_only(init__decoder=str(tmp_path), language__tokenizer=""))
    same = jax.tree.map(np.array_equal, built.state.params, fresh.state.params)
    assert all(jax.tree.leaves(same["decoder"]))
    assert not all(jax.tree.leaves(same["projector"])), "of another seed"
    assert built.tasks[0].data.tokenizer == str(tmp_path)
    with pytest.raises(WeightsError, match=r"init.decoder does not fit(.|\n)*width: 32, the model has 48$"):
        train_lib.build(captions_only(init__decoder=str(tmp_path), language__decoder__width=48))


def test_a_decoder_of_other_mathematics_is_taken_as_the_config_says_and_else_refused_by_name(tmp_path):
    sizes = train_lib.build(captions_only()).tasks[0].decoder.config
    config = dataclasses.replace(sizes, rope_theta=5e6, norm_eps=1e-5, tied=not sizes.tied)
    params = jax.tree.map(np.asarray, jax.jit(lambda: init_decoder(Qwen3(config), jax.random.key(3)))())
    save_decoder(tmp_path, config, params)
    told = {"rope_theta": 5e6, "norm_eps": 1e-5, "tied": "yes" if config.tied else "no"}
    fields = {f"language__decoder__{field}": value for field, value in told.items()}
    built = train_lib.build(captions_only(init__decoder=str(tmp_path), **fields))
    assert built.tasks[0].decoder.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, built.state.params["decoder"], params))
    with pytest.raises(WeightsError, match=r"rope_theta: 5000000.0, the model has 1000000.0"):
        train_lib.build(captions_only(init__decoder=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"language.decoder.tied: expected auto, yes or no, got 'maybe'"):
        train_lib.build(captions_only(language__decoder__tied="maybe"))


def test_kernels_start_with_the_standard_deviation_that_the_config_says():
    params = train_lib.build(captions_only(language__kernel_std=0.1)).state.params
    assert np.std(params["decoder"]["blocks"]["gate"]["kernel"]) == pytest.approx(0.1, rel=0.1)
    assert np.std(params["projector"]["mlp_0"]["kernel"]) == pytest.approx(0.1, rel=0.1)
    assert np.std(params["decoder"]["embedding"]) == pytest.approx(0.02, rel=0.1)
