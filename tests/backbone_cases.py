"""Goldens as directories that `omnistream_jax.load` reads, tiny random models, and comparison of their outputs."""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from goldens import relative_error
from safetensors.numpy import save_file

from omnistream_jax.model import Model, build_model
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.stream import Stream


def write_model(directory: Path, weights: dict[str, np.ndarray], config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def channels_last(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels, -3, -1)


def omnistream_fields(out) -> dict[str, np.ndarray]:
    """Our output under the released model's names."""
    patches = np.asarray(out.patches)
    fields = {
        "last_hidden_state": patches.reshape(*patches.shape[:2], -1, patches.shape[-1]),
        "pooler_output": out.cls,
        "register_tokens": out.registers,
    }
    if out.camera is not None:
        fields["camera_token"] = out.camera
    return fields | {f"hidden_states.{i}": hidden for i, hidden in enumerate(out.hidden)}


def assert_fields(fields: dict, expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Every field that the golden has of the same pass (other passes stand under "prefix/name")."""
    names = [name for name in expected if "/" not in name and "_total_length_" not in name]
    assert names
    errors = {name: relative_error(fields[name], expected[name]) for name in names}
    assert max(errors.values()) <= tolerance, errors


def random_model(seed: int = 0, **changes) -> Model:
    """A tiny model whose every parameter is random and weighs as much as the others, so that no mistake hides."""
    config = dataclasses.replace(BackboneConfig(width=32, depth=2, heads=2, mlp_width=64), **changes)
    image = np.zeros((1, 1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(Backbone(config).init, jax.random.key(0), image)["params"]
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        values = generator.normal(size=leaf.shape).astype(np.float32)
        if "scale" in name:  # LayerScale and the norms' scales
            return 1 + 0.2 * values
        if "kernel" in name:
            sharpness = 2 if name == "qkv_kernel" else 1  # so that attention is far from an average
            return sharpness * values * (768 if name == "patch_kernel" else 32) ** -0.5
        return values

    params = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))
    return build_model(config, params, dtype=jnp.float32)


def random_frames(batch: int, time: int, height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, time, height, width, 3)).astype(np.float32)


def step_through(model: Model, stream: Stream, frames: np.ndarray, chunks: Sequence[int]):
    """Feed the frames in chunks: the joined outputs (NumPy) and the stream after them."""
    assert sum(chunks) == frames.shape[1]
    outputs, start = [], 0
    for size in chunks:
        out, stream = model.step(stream, frames[:, start : start + size])
        outputs.append(out)
        start += size
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *outputs), stream


def stream_through(model: Model, frames: np.ndarray, chunks: Sequence[int], **options):
    """The joined outputs of a new stream."""
    batch, _, height, width, _ = frames.shape
    return step_through(model, model.open_stream(batch, height, width, **options), frames, chunks)[0]


def differences(actual, expected) -> dict[str, float]:
    """Max abs difference of every leaf, by name; the trees must have the same leaves, and none may be NaN."""
    named = [jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected)]
    assert [path for path, _ in named[0]] == [path for path, _ in named[1]]
    result = {}
    for (path, left), (_, right) in zip(*named, strict=True):
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert left.shape == right.shape
        assert np.isfinite(right).all()
        result[jax.tree_util.keystr(path)] = float(np.max(np.abs(left - right)))
    return result


def assert_close(actual, expected, tolerance: float = 1e-4) -> None:
    errors = differences(actual, expected)
    assert all(error <= tolerance for error in errors.values()), errors


def assert_same_bits(actual, expected) -> None:
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def rows(out, select):
    """The output of some streams or frames: every leaf indexed by `select`."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[select], out)


def compilations(caplog, run):
    """How often each program was compiled while `run` ran, by JAX's own log."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        result = run()
    messages = [record.getMessage() for record in caplog.records]
    names = [match[1] for message in messages if (match := re.match(r"Compiling (?:jit\()?(\w+)", message))]
    return result, Counter(names)
