"""The attentive probe as a whole: its tokens, its score, its settings, and runs on small data sets."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from clip_cases import write_clip
from goldens import load_golden, relative_error
from probe_cases import CONFIG, sampling_of, view_of, write_backbone
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from omnistream_jax import config as config_lib
from omnistream_jax import probe as probe_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.vjepa2_probe import ProbeSizes, convert_attentive_probe, save_attentive_probe
from omnistream_jax.data.probes.clip_views import SpatialViews
from omnistream_jax.evals.probes import action
from omnistream_jax.evals.probes.action import ActionProbe, video_tokens
from omnistream_jax.evals.probes.base import Heads
from omnistream_jax.evals.probes.engine import make_encode
from omnistream_jax.evals.probes.optimizers import AdamW
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = ("bending", "clapping", "diving")


@dataclasses.dataclass(frozen=True)
class Named:
    """A source that has classes alone."""

    classes: tuple[str, ...]


class Reader(nn.Module):
    """A linear map of the mean token: a head whose answers can be told beforehand."""

    classes: int

    @nn.compact
    def __call__(self, tokens):
        return tokens.mean(1) @ self.param("kernel", nn.initializers.zeros, (tokens.shape[-1], self.classes))


def make_probe(classes, heads=1, segments=1, views=1, evaluate_batch=16, head=None, **changes):
    return ActionProbe(
        heads=Heads((0.1,) * heads, (0.0,) * heads),
        batch=8,
        schedule=Cosine(1, lead=1),
        optimizer=AdamW(),
        head=head or Reader(classes),
        start=None,
        train=Named(tuple(map(str, range(classes)))),
        heldout=Named(tuple(map(str, range(classes)))),
        sampling=sampling_of(segments, 1, 1),
        view=view_of(16),
        views=SpatialViews(16, views),
        shuffle_frames=False,
        validation_seed=0,
        evaluate_batch=evaluate_batch,
        **{"heads_at_once": 0, "best_evaluation": False, "frames_alone": False, **changes},
    )


def samples_of(labels, shown):
    """Frames of one pixel; `shown` [N, frames] are their colours."""
    for label, numbers in zip(labels, shown, strict=True):
        frames = np.asarray(numbers, np.uint8).reshape(-1, 1, 1, 1)
        yield {"frames": np.repeat(frames, 3, axis=3), "label": np.int32(label)}


def encode_as_table(table):
    """A backbone whose only patch token of a frame is the row of a table that the colour names."""

    def encode(rows, frames):
        patches = rows[frames[..., 0]]  # [N, T, 1, 1, D]
        return BackboneOutput(patches, patches[:, :, 0, 0], None, None, ())

    return jax.tree_util.Partial(encode, jnp.asarray(table, jnp.float32))


def variables_of(kernels):
    return {"params": {"kernel": jnp.asarray(kernels, jnp.float32)}}


# The score


@pytest.mark.parametrize("heads_at_once", [0, 2])
def test_accuracy_equals_scikit_learns_over_segments_and_views(heads_at_once):
    """Of random heads on 37 videos, in batches of 8, each of two segments and three views."""
    generator = np.random.default_rng(0)
    labels, table = generator.integers(0, 7, 37), 3 * generator.normal(size=(200, 6))
    shown = generator.integers(0, 200, (37, 3 * 2))
    kernels = generator.normal(size=(3, 6, 7))
    kernels[1] = np.linalg.pinv(table[shown].mean(1)) @ np.eye(7)[labels] * 5  # one head that knows something
    probe = make_probe(7, 3, segments=2, views=3, evaluate_batch=8, heads_at_once=heads_at_once)
    found = probe.evaluate(encode_as_table(table), variables_of(kernels), samples_of(labels, shown))
    for row, kernel in zip(found.scores, kernels, strict=True):
        logits = table[shown].reshape(37, 3, 2, 6).mean(2) @ kernel  # the tokens of a view's segments lie side by side
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = (powers / powers.sum(-1, keepdims=True)).mean(1)
        assert row["top1"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)), abs=1e-12)
        top5 = top_k_accuracy_score(labels, probabilities, k=5, labels=range(7))
        assert row["top5"] == pytest.approx(top5, abs=1e-12)
    assert found.scores[1]["top1"] > found.scores[0]["top1"] + 0.1


def test_a_perfect_head_scores_1_and_permuted_ones_chance():
    labels = np.repeat(np.arange(10), 150)
    permuted = np.random.default_rng(0).permutation(labels)
    probe, eye = make_probe(10, 2, evaluate_batch=500), np.eye(10)
    heads = variables_of([eye, np.roll(eye, 1, axis=1)])
    perfect = probe.evaluate(encode_as_table(eye), heads, samples_of(labels, labels[:, None]))
    assert [row["top1"] for row in perfect.scores] == [1.0, 0.0]
    chance = probe.evaluate(encode_as_table(eye), heads, samples_of(labels, permuted[:, None]))
    assert chance.scores[0]["top1"] == pytest.approx(0.1, abs=0.02)
    assert chance.scores[0]["top5"] < 1.0


def test_top5_is_left_out_where_there_are_no_more_classes():
    samples = samples_of(range(4), np.arange(4)[:, None])
    found = make_probe(4).evaluate(encode_as_table(np.eye(4)), variables_of([np.eye(4)]), samples)
    assert found.scores == [{"top1": 1.0}]


# The tokens


def test_tokens_are_those_of_all_segments_each_a_stream_of_its_own():
    model = random_model(patch_size=8)
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 24, 3)).astype(np.uint8)
    encode = make_encode(model, make_mesh())
    with jax.set_mesh(make_mesh()):
        tokens = jax.jit(video_tokens, static_argnums=2)(encode, frames, 2)
    clips = [np.asarray(model.encode(frames[:, part], layers=()).patches) for part in (slice(0, 3), slice(3, 6))]
    expected = np.concatenate([clip.reshape(2, 3 * 2 * 3, 32) for clip in clips], axis=1)
    assert tokens.shape == (2, 36, 32)
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4)
    whole = model.encode(frames, layers=()).patches[:, 3:]  # the second part sees the first one there
    assert np.abs(np.asarray(whole).reshape(2, 18, 32) - expected[:, 18:]).max() > 1e-2


@pytest.mark.parametrize("clips", [0, 1])
def test_frames_alone_are_those_of_single_frame_clips_and_a_permutation_of_them_permutes_their_tokens(clips):
    model, order = random_model(patch_size=8), [2, 0, 1]
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 24, 3)).astype(np.uint8)  # 2 segments of 3 frames
    permuted = frames.reshape(2, 2, 3, 16, 24, 3)[:, :, order].reshape(frames.shape)
    tokens = {}
    with jax.set_mesh(make_mesh()):
        for alone in (True, False):
            encode = make_encode(model, make_mesh(), clips=clips, frames_alone=alone)
            for name, shown in (("plain", frames), ("permuted", permuted)):
                of_frames = jax.jit(video_tokens, static_argnums=2)(encode, shown, 2).reshape(2, 2, 3, 6, 32)
                tokens[alone, name] = np.asarray(of_frames)
    single = model.encode(frames.reshape(12, 1, 16, 24, 3), layers=()).patches
    np.testing.assert_allclose(tokens[True, "plain"].reshape(12, 6, 32), np.reshape(single, (12, 6, 32)), atol=1e-4)
    np.testing.assert_allclose(tokens[True, "permuted"], tokens[True, "plain"][:, :, order], atol=1e-4)
    assert np.abs(tokens[False, "permuted"] - tokens[False, "plain"][:, :, order]).max() > 1e-2


def test_the_loss_is_the_mean_cross_entropy():
    generator = np.random.default_rng(0)
    tokens, labels = generator.normal(size=(4, 5, 8)).astype(np.float32), np.array([0, 2, 1, 2])
    kernel = generator.normal(size=(8, 3)).astype(np.float32)
    batch = {"label": labels}
    loss, statistics = make_probe(3).loss(variables_of(kernel), tokens, batch, jnp.int32(0), jax.random.key(1))
    logits = tokens.astype(np.float64).mean(1) @ kernel
    assert loss == pytest.approx(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]), rel=1e-5)
    assert statistics is None


# The recipes


BACKBONE = BackboneConfig(width=64, depth=1, heads=2, mlp_width=64)


def write_videos(folder, train=2, val=1):
    """The lists and videos of three classes, told by how bright they are."""
    for split, count in (("train", train), ("val", val)):
        lines = []
        for label, name in enumerate(CLASSES):
            for number in range(count):
                frames = [np.full((32, 48, 3), 30 + 90 * label + frame, np.uint8) for frame in range(12)]
                write_clip(folder / split / name / f"{number}.mp4", frames, size=(48, 32), rate=8)
                lines.append(f"{split}/{name}/{number}.mp4 {label}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def filled(recipe, **fields):
    return probe_lib.with_preset(config_lib.load(f"{CONFIG}:{recipe}", fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 40}, "size: expected a multiple of the patch, 16 pixels, got 40"),
        ({"probe_heads": 5}, "probe_heads: expected a divisor of the width 64, got 5"),
        ({"probe_depth": 0}, "probe_depth: expected 1 block or more, got 0"),
        ({"features": "stream"}, "features: expected one of clip, frame, got 'stream'"),
        ({"features": "frame", "time_unit": 8.0}, "time_unit: frames that are encoded alone have no time, got 8"),
        ({"rand_augment": "augmix"}, "rand_augment: 'augmix', expected a name like"),
        ({"validation_window": "first"}, "^validation_window: 'first', expected random or middle"),
        ({"crop_scale": (0.5,)}, r"^crop_scale: \(0.5,\), expected \(smallest, largest\)"),
        ({"data": "embedded"}, "data: the embedded world is the recipe world_motion's"),
    ],
)
def test_fields_that_cannot_work_are_refused(tmp_path, fields, message):
    fields = {"data": str(write_videos(tmp_path, 1)), "classes": 3, "allow_incomplete": True} | fields
    with pytest.raises(ValueError, match=message):
        action.build(filled("ssv2", **fields), BACKBONE)


def test_heads_start_from_given_weights(tmp_path):
    golden = load_golden("08a_vjepa2_attentive_classifier")
    params = convert_attentive_probe(golden.weights, ProbeSizes(64, 256, 4, 10))
    save_attentive_probe(tmp_path / "probe.safetensors", params)
    fields = {"initial_probe": str(tmp_path / "probe.safetensors"), "probe_heads": 16, "probe_depth": 4}
    head, start = action._head(filled("world_motion", **fields), BACKBONE, 10)
    variables = dataclasses.replace(make_probe(10, head=head), start=start).init(jax.random.key(0), None)
    assert relative_error(jax.jit(head.apply)(variables, golden.inputs["x"]), golden.outputs["logits"]) < 2e-5
    assert action._head(filled("world_motion", **(fields | {"probe_heads": 8})), BACKBONE, 10)[0].heads == 8
    with pytest.raises(ValueError, match=r"expected a probe of classes 11, not 10, probe_depth 2, not 4"):
        action._head(filled("world_motion", **(fields | {"probe_depth": 2})), BACKBONE, 11)


# The job


def config_of(tmp_path, recipe, **fields):
    common = {
        "checkpoint": str(write_backbone(tmp_path / "model")),
        "output": str(tmp_path / "out"),
        "size": 16,
        "frames": 2,
        "batch": 6,
        "steps": 6,
        "evaluate_every": 3,
        "probe_heads": 4,
        "probe_depth": 2,
        "learning_rates": (1e-2, 1e-3),
        "weight_decays": (0.01,),
        "loader.workers": 0,
        "plots": False,
        "compilation_cache": "",
    }
    return config_lib.load(f"{CONFIG}:{recipe}", common | fields)


def run(tmp_path, recipe, **fields):
    config = config_of(tmp_path, recipe, **fields)
    assert probe_lib.probe(config) == 0
    return json.loads((tmp_path / "out" / "probe.json").read_text())


def test_videos_of_the_published_lists_are_learned_and_scored(tmp_path, monkeypatch):
    folder = write_videos(tmp_path / "data")
    fields = {"data": str(folder), "classes": 3, "allow_incomplete": True, "segments": 2, "stride": 2, "steps": 30}
    fields |= {"rand_augment": "", "evaluate_every": 15, "evaluate_batch": 2}
    content = run(tmp_path, "ssv2", **fields)
    assert content["published"] is None
    assert content["best"]["top1"] == 1.0  # brightness tells the class
    assert content["data"]["train"]["videos"] == 6
    assert content["data"]["validation"]["views"]["views"] == 3
    assert content["data"]["validation"]["sampling"] == {"segments": 2, "frames": 2, "stride": 2, "window": "random"}
    evaluations = json.loads((tmp_path / "out" / "evaluations.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [15, 30]


def test_the_worlds_motions_are_scored_from_features_that_are_encoded_once(tmp_path):
    world = {"scenes": 22, "heldout_scenes": 11, "evaluate_batch": 11}
    content = run(tmp_path, "world_motion", **world)
    assert content["data"]["validation"]["videos"] == 11
    assert set(content["heads"][0]) >= {"top1", "top5"}
    assert (tmp_path / "out" / "features" / "train.safetensors").exists()
    with pytest.raises(ConfigError, match="other settings"):
        run(tmp_path, "world_motion", **world, shuffle_frames=True)
    with pytest.raises(ConfigError, match=r'other settings.*\n  features: "clip" -> "frame"'):
        run(tmp_path, "world_motion", **world, features="frame")


@pytest.mark.parametrize("features", ["clip", "frame"])
def test_the_job_encodes_clips_or_frames_as_its_field_says(tmp_path, features):
    """The tokens of frames in another order are the same in another order where each frame is encoded alone."""
    config = config_of(tmp_path, "world_motion", scenes=11, heldout_scenes=11, features=features)
    job, order = probe_lib.build(config), [1, 0]
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3)).astype(np.uint8)
    with jax.set_mesh(job.mesh):
        tokens, permuted = (
            np.asarray(job.probe.features(job.encode, shown)).reshape(2, 4, 32) for shown in (frames, frames[:, order])
        )
    assert (np.abs(permuted - tokens[order]).max() < 1e-4) == (features == "frame")
    assert job.settings["features"] == features
