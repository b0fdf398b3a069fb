"""CO3Dv2: written by PyTorch3D's conventions, read back as the room that it shows."""

import json

import numpy as np
import pytest
from PIL import Image
from pytorch3d_cases import viewpoint, write_float16_png, write_jgz
from world_cases import assert_is_world, assert_reprojects, room

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.co3d import Co3D

SCALE = 2.0  # depth.scale_adjustment
SEQUENCE = "apple/110_13051_23361"


@pytest.fixture(scope="module")
def world():
    return room()


def annotation(world, t, intrinsics_format="ndc_isotropic"):
    name = f"frame{3 * t + 1:06d}.jpg"
    height, width = world.depth[t].shape
    return {
        "sequence_name": SEQUENCE.split("/")[1],
        "frame_number": 20 + t,  # need not be the number in the file's name
        "frame_timestamp": -1.0,
        "image": {"path": f"{SEQUENCE}/images/{name}", "size": [height, width]},
        "depth": {
            "path": f"{SEQUENCE}/depths/{name}.geometric.png",
            "scale_adjustment": SCALE,
            "mask_path": f"{SEQUENCE}/depth_masks/frame{3 * t + 1:06d}.png",
        },
        "mask": {"path": f"{SEQUENCE}/masks/frame{3 * t + 1:06d}.png", "mass": 3.0},
        "viewpoint": viewpoint(world.intrinsics, world.cam_to_world[t], height, width, intrinsics_format),
        "meta": {"frame_type": "train"},
    }


def write_annotations(root, annotations):
    write_jgz(root / "apple/frame_annotations.jgz", annotations)


@pytest.fixture
def root(tmp_path, world):
    for t, (picture, depth) in enumerate(zip(world.frames, world.depth, strict=True)):
        entry = annotation(world, t)
        write_float16_png(tmp_path / entry["depth"]["path"], depth / SCALE)
        trusted = np.full(depth.shape, 255, np.uint8)
        trusted[:5, :7] = 0
        for path, array, options in (
            (entry["image"]["path"], picture, {"quality": 95}),
            (entry["depth"]["mask_path"], trusted, {}),
        ):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / path, **options)
    (tmp_path / "apple/189_20393_38136").mkdir()
    write_annotations(tmp_path, [annotation(world, t) for t in (2, 0, 3, 1)])
    qualities = [("110_13051_23361", 1.2), ("189_20393_38136", 0.4), ("11_111_111", 2.0), ("22_222_222", None)]
    entries = [{"sequence_name": name, "viewpoint_quality_score": quality} for name, quality in qualities]
    write_jgz(tmp_path / "apple/sequence_annotations.jgz", entries)
    listed = [[SEQUENCE.split("/")[1], 20 + t, annotation(world, t)["image"]["path"]] for t in range(4)]
    listed += [[name, 0, f"apple/{name}/images/frame000001.jpg"] for name, _ in qualities[1:]]
    (tmp_path / "apple/set_lists").mkdir()
    (tmp_path / "apple/set_lists/set_lists_fewview_train.json").write_text(json.dumps({"train": listed, "val": []}))
    return tmp_path


def test_a_sequence_is_read_back(root, world):
    reader = Co3D.open(root)
    assert reader.sequences == (SEQUENCE,)  # of good cameras, and there
    assert (reader.frame_count(0), reader.neighbours(0, 0)) == (4, None)
    assert not reader.info(0).metric
    frames = reader.read(0, range(4))
    assert_is_world(frames, world)
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [-0.7, 0.11, -1.26], atol=1e-6)
    assert frames[3].path.endswith("images/frame000010.jpg")


def test_depth_outside_its_mask_is_not_valid(root):
    valid = Co3D.open(root).read(0, [1])[0].valid
    assert not valid[:5, :7].any()
    assert valid.sum() == valid.size - 35


@pytest.mark.parametrize("intrinsics_format", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_intrinsics_of_both_formats(root, world, intrinsics_format):
    write_annotations(root, [annotation(world, t, intrinsics_format) for t in range(4)])
    frame = Co3D.open(root).read(0, [0])[0]
    np.testing.assert_allclose(frame.intrinsics, [[50, 0, 33.5], [0, 52.5, 22], [0, 0, 1]], atol=1e-4)


def test_frames_without_a_camera_or_not_listed_are_left_out(root, world):
    entries = [annotation(world, t) for t in range(4)]
    entries[0]["viewpoint"] = None
    entries[1]["viewpoint"]["T"] = [0.0, float("nan"), 0.0]
    entries[3]["frame_number"] = 99
    write_annotations(root, entries)
    reader = Co3D.open(root)
    assert reader.frame_count(0) == 1
    assert_is_world(reader.read(0, [0]), world, numbers=[2])


def test_another_layout_is_refused_by_what_was_expected(root, tmp_path_factory):
    with pytest.raises(DataError, match=r"holds no CATEGORY/sequence_annotations\.jgz"):
        Co3D.open(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="no split 'test', expected one of train, dev"):
        Co3D.open(root, "test")
    with pytest.raises(DataError, match=r"set_lists_fewview_dev\.json: .* expected the list of the split dev"):
        Co3D.open(root, "dev")
    (root / "apple/set_lists/set_lists_fewview_train.json").write_text("[]")
    with pytest.raises(DataError, match=r"set_lists_fewview_train\.json: expected a set list"):
        Co3D.open(root)


def test_annotations_that_cannot_be_read_are_named(root, world):
    for change, message in (
        ({"intrinsics_format": "pixels"}, "neither ndc_isotropic nor ndc_norm_image_bounds"),
        ({"R": [1.0]}, "cannot reshape"),
    ):
        entry = annotation(world, 0)
        entry["viewpoint"] |= change
        write_annotations(root, [entry])
        with pytest.raises(DataError, match=rf"frame_annotations\.jgz: expected FrameAnnotations.*{message}"):
            fresh(root).frame_count(0)
    entry = annotation(world, 0)
    entry["image"]["path"] = "../../secret/images/frame000001.jpg"
    write_annotations(root, [entry])
    with pytest.raises(DataError, match=r"is not of the form SEQUENCE/FOLDER/FILE"):
        fresh(root).frame_count(0)


def fresh(root):
    """A reader whose annotations nobody has read yet: they are kept by path."""
    from omnistream_jax.data.readers.pytorch3d import read_annotations

    read_annotations.cache_clear()
    return Co3D.open(root)


def test_a_damaged_file_is_named(root, world):
    (root / annotation(world, 2)["depth"]["path"]).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"frame000007\.jpg\.geometric\.png: expected a 16-bit PNG"):
        Co3D.open(root).read(0, [2])
    picture = root / annotation(world, 1)["image"]["path"]
    Image.fromarray(world.frames[1][:40]).save(picture)
    with pytest.raises(DataError, match=r"frame000004\.jpg: its annotation says 48 x 64, the image is 40 x 64"):
        Co3D.open(root).read(0, [1])
