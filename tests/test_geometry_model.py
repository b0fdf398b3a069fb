"""Geometry of streams and of clips, and the files of a backbone with geometry heads."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from backbone_cases import assert_same_bits, random_model
from geometry_model_cases import random_geometry_model
from goldens import relative_error
from safetensors.numpy import load_file, save_file
from scipy.spatial.transform import Rotation

import omnistream_jax
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.geometry.cameras import fields_of_view
from omnistream_jax.geometry_model import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, TIME, HEIGHT, WIDTH = 2, 6, 32, 48
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model():
    return random_geometry_model()


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(1).integers(0, 256, (BATCH, TIME, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def offline(model, frames):
    return jax.device_get(model.reconstruct(frames))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model.save(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def assert_fields_close(actual, expected) -> None:
    errors = {
        field.name: relative_error(np.asarray(getattr(actual, field.name)), getattr(expected, field.name))
        for field in dataclasses.fields(expected)
    }
    assert max(errors.values()) <= TOLERANCE, errors


def frames_of(geometry, select):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[select], geometry)


# Streams and clips


def test_shapes_and_ranges_of_frames_that_are_not_square(offline):
    assert offline.depth.shape == offline.depth_confidence.shape == (BATCH, TIME, HEIGHT, WIDTH)
    assert offline.rays.shape == (BATCH, TIME, 16, 24, 6)
    assert offline.ray_confidence.shape == (BATCH, TIME, 16, 24)
    assert offline.depth.min() > 0
    assert min(offline.depth_confidence.min(), offline.ray_confidence.min()) >= 1
    np.testing.assert_array_equal(offline.intrinsics[..., :2, 2], np.full((BATCH, TIME, 2), (WIDTH / 2, HEIGHT / 2)))
    assert offline.depth.std(axis=(2, 3)).min() > 0.01, "a flat picture would hide mistakes"
    assert np.abs(np.diff(offline.depth, axis=1)).max() > 0.01
    assert offline.cam_to_world.std(axis=1).max() > 0.001


def test_a_stream_in_chunks_of_three_equals_the_clip(model, frames, offline):
    stream = model.open_stream(BATCH, HEIGHT, WIDTH)
    for start in range(0, TIME, 3):
        geometry, features, stream = model.step(stream, frames[:, start : start + 3])
        assert_fields_close(geometry, frames_of(offline, np.s_[:, start : start + 3]))
        assert features.patches.shape == (BATCH, 3, 2, 3, 32)
    assert stream.frame_index.tolist() == [TIME] * BATCH


def test_streams_that_pause_frame_by_frame_equal_the_clips(model, frames, offline):
    stream, taken = model.open_stream(BATCH, HEIGHT, WIDTH), np.zeros(BATCH, int)
    for active in ([True, False], [True, True], [False, True]) * 3:
        at = np.minimum(taken, TIME - 1)
        active = np.array(active) & (taken < TIME)
        geometry, _, stream = model.step(stream, frames[np.arange(BATCH), at][:, None], active=active)
        for lane in np.flatnonzero(active):
            assert_fields_close(
                frames_of(geometry, np.s_[lane, 0]), frames_of(offline, np.s_[int(lane), int(taken[lane])])
            )
        taken += active
    assert taken.tolist() == stream.frame_index.tolist() == [TIME, TIME]


def test_the_camera_is_read_from_its_token_at_the_frames_aspect(model, frames, offline):
    """The head once more, in NumPy."""
    ratio = np.full(BATCH, HEIGHT / WIDTH, np.float32)
    token = model.model.encode(frames, layers=(0, 1, 2, 3), camera_token=True, aspect_ratio=ratio).camera
    x, head = np.asarray(token, np.float64), jax.device_get(model.params["camera"])
    for name in ("hidden_0", "hidden_1", "output"):
        x = x @ head[name]["kernel"] + head[name]["bias"]
        x = x if name == "output" else np.maximum(x, 0)
    assert relative_error(offline.cam_to_world[..., :3, 3], x[..., :3]) <= TOLERANCE
    rotations = Rotation.from_quat(x[..., 3:7].reshape(-1, 4)).as_matrix().reshape(BATCH, TIME, 3, 3)
    assert relative_error(offline.cam_to_world[..., :3, :3], rotations) <= TOLERANCE
    assert relative_error(np.asarray(fields_of_view(offline.intrinsics, HEIGHT, WIDTH)), x[..., 7:]) <= TOLERANCE
    assert model.open_stream(BATCH, HEIGHT, WIDTH).state.aspect_ratio.tolist() == ratio.tolist()


def test_cameras_from_rays_reproject_the_rays(offline):
    poses, intrinsics = offline.cameras_from_rays()
    origins = np.average(offline.rays[..., :3], axis=(2, 3), weights=np.stack([offline.ray_confidence] * 3, -1))
    assert relative_error(np.asarray(poses)[..., :3, 3], origins) <= TOLERANCE
    assert np.allclose(np.linalg.det(np.asarray(poses)[..., :3, :3]), 1, atol=1e-4)
    assert (np.asarray(intrinsics)[..., [0, 1], [0, 1]] > 0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 32, 48, 3), "frames: expected an array"), ((32, 48, 3), "frames: "), ((1, 1, 40, 48, 3), "multiples of 16")],
)
def test_frames_that_cannot_be_are_one_clear_error(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.reconstruct(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("changes", [{"width": 0}, {"height": 0}, {"height": 24}])
def test_sizes_that_cannot_be_are_one_clear_error(model, changes):
    with pytest.raises(ValueError, match="multiples of 16"):
        model.open_stream(**changes)


def test_a_stream_of_the_backbone_alone_is_refused(model, frames):
    stream = model.model.open_stream(BATCH, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"stream: .* open it with this model"):
        model.step(stream, frames[:, :1])


def test_a_stream_is_stepped_with_frames_of_its_size(model, frames):
    with pytest.raises(ValueError, match="the stream was opened for"):
        model.step(model.open_stream(BATCH, HEIGHT, HEIGHT), frames[:, :1])


# Files


def test_load_gives_back_what_save_wrote(model, saved, tmp_path):
    loaded = omnistream_jax.load_geometry(saved)
    assert loaded.heads == model.heads
    assert_same_bits(loaded.params, model.params)
    assert_same_bits(loaded.model.params, model.model.params)
    loaded.save(tmp_path / "again")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
        assert path.stat().st_mode == (saved / CONFIG_NAME).stat().st_mode, path.name
    assert len(list(saved.iterdir())) == 4, "nothing is left aside"


def test_a_save_that_fails_leaves_the_older_heads(model, copied, monkeypatch):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omnistream_jax.utils.tensor_file.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_the_backbone_is_also_read_alone(model, saved):
    assert_same_bits(omnistream_jax.load(saved).params, model.model.params)


def test_the_activations_type_is_that_of_the_backbone(saved):
    assert omnistream_jax.load_geometry(saved, dtype="bfloat16").heads.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 1, 2, 4]}, r"layers: the backbone has 4 blocks, got \(0, 1, 2, 4\)"),
        ({"layers": [-1, 1, 2, 3]}, "layers: expected 4 blocks in their order"),
        ({"layers": [1, 0, 2, 3]}, "layers: expected 4 blocks in their order"),
        ({"layers": [0, 1, 2]}, "layers: expected 4 blocks in their order"),
        ({"layers": [0, 1, 2, 2.5]}, "layers: expected whole numbers"),
        ({"layers": "0123"}, "layers: expected whole numbers"),
        ({"out_channels": [4, 8, 12, 13]}, "out_channels: expected 4 multiples of 4"),
        ({"features": 12}, "features: expected a multiple of 8"),
        ({"features": None}, "features: expected whole numbers"),
        ({"units": "feet"}, "units: expected clip or metres, got 'feet'"),
        ({"colour": 1}, "expected the keys .*'features', 'layers', 'out_channels', 'units'.*, got .*colour"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(copied, changes, message):
    path = copied / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(WeightsError, match=rf"{CONFIG_NAME}: .*{message}"):
        omnistream_jax.load_geometry(copied)


def test_weights_that_do_not_fit_are_listed_in_one_error(copied):
    path = copied / WEIGHTS_NAME
    tensors = load_file(path)
    del tensors["dpt/norm/scale"]
    tensors["camera/output/bias"] = np.zeros(7, np.float32)
    save_file(tensors | {"extra": np.zeros(1, np.float32)}, path)
    with pytest.raises(WeightsError, match=rf"{WEIGHTS_NAME}: ") as caught:
        omnistream_jax.load_geometry(copied)
    for part in (
        "dpt/norm/scale is missing",
        "extra is not expected",
        r"camera/output/bias is float32[7], expected shape [9]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(WeightsError, match=name):
        omnistream_jax.load_geometry(copied)


def test_a_backbone_without_camera_token_is_refused(copied, tmp_path):
    dinov3 = random_model(depth=4, camera=False, token_versions=1, rope="dinov3_2d")
    dataclasses.replace(dinov3, family="dinov3").save(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        shutil.copy(path, copied / path.name)
    with pytest.raises(WeightsError, match="geometry heads need a backbone with a camera token"):
        omnistream_jax.load_geometry(copied)
