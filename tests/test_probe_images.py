"""Pictures with classes: the published layout, views to torchvision's definition, things of the rendered world."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from probe_cases import CLASSES, write_images

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.probes.images import random_resized_box, training_view, validation_view
from omnistream_jax.data.probes.labelled import (
    LabelledData,
    LabelledViews,
    WorldObjects,
    check_same_classes,
    image_folder,
)
from omnistream_jax.data.world.clips import render_clip
from omnistream_jax.data.world.scenes import SHAPES, build_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


# The layout


def test_folders_are_classes_by_the_alphabet(folder):
    source = image_folder(folder, "val", 3, 12)
    assert source.classes == CLASSES
    assert len(source) == 12
    assert [source.labels[index] for index in (0, 4, 11)] == [0, 1, 2]
    image, label = source.read(5)
    path = folder / "val" / CLASSES[1] / f"{CLASSES[1]}_val_1.JPEG"
    assert source.describe(5) == str(path)
    assert label == 1
    np.testing.assert_array_equal(image, Image.open(path))
    assert source.settings()["images"] == 12
    assert source.settings()["complete"]


def test_pictures_stay_as_they_are_stored(tmp_path):
    """torchvision and DINOv3 read no EXIF."""
    place = tmp_path / "val" / "cat"
    place.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(place / "a.jpg", exif=exif)
    assert image_folder(tmp_path, "val", 1, 1).read(0)[0].shape == (10, 20, 3)


@pytest.mark.parametrize(
    ("split", "classes", "images", "message"),
    [
        ("test", 3, 12, r"test: there is no such folder; expected test/CLASS/IMAGE"),
        ("val", 3, 50_000, r"val: 12 images of 3 classes, expected 50,000 images of 3 classes; allow_incomplete"),
        ("val", 1_000, 12, r"val: 12 images of 3 classes, expected 12 images of 1,000 classes"),
        ("val", 2, None, r"val: 12 images of 3 classes, expected at most 2 classes"),
    ],
)
def test_other_counts_are_refused(folder, split, classes, images, message):
    with pytest.raises(DataError, match=message):
        image_folder(folder, split, classes, images)


@pytest.mark.parametrize(("classes", "images", "complete"), [(3, 12, True), (4, 12, False), (3, 50_000, False)])
def test_what_may_be_incomplete_says_whether_it_is(folder, classes, images, complete):
    settings = image_folder(folder, "val", classes, images, incomplete=True).settings()
    assert (settings["images"], settings["expected_images"], settings["complete"]) == (12, images, complete)
    with pytest.raises(DataError, match=r"val: 12 images of 3 classes, expected at most 2 classes$"):
        image_folder(folder, "val", 2, images, incomplete=True)


def test_other_layouts_are_refused(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match=r"val: expected a folder for each class, found none"):
        image_folder(tmp_path, "val", 1_000, None)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match=r"cat: expected image files \(.*\.jpeg.*\), found none"):
        image_folder(tmp_path, "val", 1_000, None)


def test_splits_of_other_classes_are_refused():
    train, val = (SimpleNamespace(name=name, classes=classes) for name, classes in (("a", ("x", "y")), ("b", ("x",))))
    with pytest.raises(DataError, match="a and b have other classes: y in one alone"):
        check_same_classes(train, val)


# Views


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (60, 100, (66, 40), (21, 8)),
        (100, 61, (40, 65), (8, 20)),
        (40, 40, (40, 40), (8, 8)),
        (30, 37, (49, 40), (12, 8)),
    ],
)
def test_the_validation_view_is_the_centre_of_the_resized_picture(height, width, resized, corner):
    """Sizes as torchvision's Resize(40) and CenterCrop(24) give them: int() of the long side, round() of the corner."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    left, top = corner
    expected = Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 24, top + 24))
    np.testing.assert_array_equal(validation_view(image, 40, 24), expected)


def test_random_boxes_have_the_shares_and_aspects_of_torchvision():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_box(rng, 300, 400) for _ in range(4_000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 400).all()
    assert (boxes[:, 3] <= 300).all()
    share, aspect = width * height / 120_000, np.log(width / height)
    assert share.min() == pytest.approx(0.08, abs=0.005)
    assert share.max() > 0.9
    assert abs(aspect).max() < math.log(4 / 3) + 0.02
    small = share < 0.5  # where every box fits: shares are uniform
    assert np.quantile(share[small], 0.5) == pytest.approx(0.29, abs=0.02)
    assert boxes[small, 0].max() > 200
    assert abs(np.mean(boxes[small, 0] / (400 - width[small])) - 0.5) < 0.02


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 400, (193, 0, 206, 10)), (400, 10, (0, 193, 10, 206))])
def test_a_picture_that_fits_no_box_gives_its_centre(height, width, expected):
    box = random_resized_box(np.random.default_rng(0), height, width, scale=(1.0, 1.0))
    assert box == expected


def test_the_training_view_is_a_crop_that_is_mirrored_half_of_the_time():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :, 0] = np.arange(40) * 6
    views = [training_view(image, np.random.default_rng(seed), 16) for seed in range(200)]
    rising = [view[8, -1, 0] > view[8, 0, 0] for view in views]
    assert all(view.shape == (16, 16, 3) for view in views)
    assert 0.4 < np.mean(rising) < 0.6


def test_training_batches_hold_every_picture_once_a_pass(folder):
    source = image_folder(folder, "train", 3, 24)
    with build_pipeline({"probe": LabelledData((source,), 8, size=16)}, seed=1) as pipeline:
        batches = [next(pipeline)["probe"] for _ in range(3)]
    assert batches[0]["frames"].shape == (8, 1, 16, 16, 3)
    assert batches[0]["frames"].dtype == np.uint8
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(labels).tolist() == [8, 8, 8]
    records = np.concatenate([batch["record"] for batch in batches])
    assert sorted(records) == list(range(24))
    assert [source.labels[record] for record in records] == labels.tolist()
    colours = np.concatenate([batch["frames"] for batch in batches]).mean((1, 2, 3)).argmax(1)
    np.testing.assert_array_equal(colours, labels)


# The rendered world


@pytest.fixture(scope="module")
def objects():
    return WorldObjects("heldout", 60)


def test_a_crop_of_the_world_shows_a_thing_of_its_class(objects):
    labels = []
    for index in range(24):
        crop, label = objects.read(index)
        labels.append(label)
        assert crop.shape[0] == crop.shape[1] <= 96
        assert crop.dtype == np.uint8
        again, same = objects.read(index)
        np.testing.assert_array_equal(crop, again)
        shapes = {thing.shape for thing in build_scene(0, "heldout", index).things}
        assert same == label
        assert objects.classes[label] in shapes
    assert set(labels) == set(range(len(SHAPES)))


def test_a_crop_of_the_world_is_the_box_of_the_thing_with_its_margin():
    """Found again in the frame that is rendered apart: the crop's place holds a thing of that shape in its middle."""
    source = WorldObjects("train", 10, margin=0.5)
    for index in range(6):
        crop, label = source.read(index)
        rng = np.random.default_rng([0, 0, index, 0x0B1EC7])
        clip = render_clip(build_scene(0, "train", index), [rng.random()], 96)
        side = len(crop)
        places = [
            (top, left)
            for top in range(97 - side)
            for left in range(97 - side)
            if np.array_equal(clip.images[0, top : top + side, left : left + side], crop)
        ]
        assert places
        top, left = places[0]
        shapes = [None, *(list(SHAPES).index(thing.shape) for thing in clip.scene.things)]
        inside = clip.ids[0, top : top + side, left : left + side]
        assert label in [shapes[thing] for thing in np.unique(inside) if thing]


def test_splits_and_seeds_of_the_world_differ(objects):
    other = WorldObjects("train", 60)
    seeded = WorldObjects("heldout", 60, seed=1)
    for source in (other, seeded):
        assert any(not np.array_equal(source.read(index)[0], objects.read(index)[0]) for index in range(3))


def test_views_of_the_world_are_samples(objects):
    views = LabelledViews(objects, 32, 32)
    sample = views.sample(3)
    assert sample["frames"].shape == (1, 32, 32, 3)
    assert sample["label"].dtype == np.int32
    assert len(views) == 60
    assert views.settings()["images"] == 60


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "val"}, "split: 'val', expected train or heldout"),
        ({"length": 0}, "scenes: 0, expected 1 or more"),
        ({"render_size": 8}, "render_size: 8, expected 16 to 1024"),
        ({"margin": -1.0}, "margin: -1.0, expected 0 to 4"),
        ({"smallest": 200}, "smallest: 200, expected 1 to render_size"),
    ],
)
def test_fields_of_the_world_that_cannot_be_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        WorldObjects(**{"split": "train", "length": 4} | fields)
