"""ADE20K as a linear probe: layout, augmentation, sliding window, scores, a run from end to end."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from backbone_cases import random_model
from dense_probe_cases import COLOURS, PIXELS, ade_augmentation, colour_head, recipe, see_pixels, write_ade
from PIL import Image
from sklearn.metrics import jaccard_score

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.probes import ade20k as layout
from omnistream_jax.data.probes.ade20k import (
    AdeData,
    _brightness,
    _contrast,
    _hue,
    _saturation,
    distort_colours,
    open_ade20k,
    resize_short_side,
    short_side_size,
)
from omnistream_jax.data.probes.colours import DEVIATION, MEAN
from omnistream_jax.evals.probes import ade20k
from omnistream_jax.evals.probes.ade20k import SegmentationProbe
from omnistream_jax.evals.probes.base import Evaluation
from omnistream_jax.probe import probe
from omnistream_jax.utils.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small(root, **fields):
    sizes = {"size": 32, "window": 32, "stride": 21, "augmentation__crop": 32, "augmentation__short_side": 32}
    return recipe("ade20k", data=str(root), **{**sizes, **fields})


# The layout


@pytest.mark.parametrize("lists", [True, False])
def test_labels_begin_at_zero_and_what_has_none_is_255(tmp_path, lists):
    root = write_ade(tmp_path / "ADEChallengeData2016", lists=lists)
    images = open_ade20k(tmp_path, "val", incomplete=True)  # the folder above will do
    assert [images.describe(i)[-16:] for i in range(3)] == [f"val_{i:08d}.jpg" for i in range(3)]
    assert images.settings()["list"] == ("ADE20K_object150_val.txt" if lists else "images/validation")
    picture, labels = images.read(1)
    assert picture.shape == (32, 51, 3)
    assert (labels[:4, :4] == 255).all()
    np.testing.assert_array_equal(COLOURS[labels[8:, 8:]], picture[8:, 8:])
    assert root == images.root


def test_pictures_stay_as_they_are_stored_for_so_do_their_labels(tmp_path):
    root = write_ade(tmp_path)
    path = root / "images/validation/ADE_val_00000001.jpg"
    stored, orientation = Image.open(path), Image.Exif()
    orientation[0x0112] = 6  # a quarter turn
    stored.save(path, format="PNG", exif=orientation)
    picture, labels = open_ade20k(root, "val", incomplete=True).read(1)
    assert picture.shape[:2] == labels.shape == (32, 51)


def test_other_counts_than_the_published_ones_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"ADE20K_object150_train.txt: 4 pictures, the published split has 20,210"):
        open_ade20k(write_ade(tmp_path), "train")
    with pytest.raises(DataError, match=r"images/validation: 3 pictures, the published split has 2,000"):
        open_ade20k(write_ade(tmp_path / "other", lists=False), "val")


def test_as_many_pictures_as_are_published_are_complete_whatever_is_allowed(tmp_path, monkeypatch):
    root = write_ade(tmp_path)
    assert not open_ade20k(root, "val", incomplete=True).settings()["complete"]
    monkeypatch.setattr(layout, "COUNTS", {"train": 4, "val": 3})
    for incomplete in (True, False):
        assert open_ade20k(root, "val", incomplete=incomplete).settings()["complete"]


def test_what_does_not_fit_the_layout_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no images/validation of ADE20K"):
        open_ade20k(tmp_path, "val")
    root = write_ade(tmp_path)
    images = open_ade20k(root, "val", incomplete=True)
    labels = root / "annotations/validation/ADE_val_00000001.png"
    Image.fromarray(np.full((32, 51), 151, np.uint8)).save(labels)
    with pytest.raises(DataError, match=r"ADE_val_00000001.png: a label is 151, expected 0 to 150"):
        images.read(1)
    Image.new("L", (20, 10)).save(labels)
    with pytest.raises(DataError, match=r"ADE_val_00000001.png: 20 x 10 pixels, its picture has 51 x 32"):
        images.read(1)
    Image.new("RGB", (51, 32)).save(labels)
    with pytest.raises(DataError, match=r"ADE_val_00000001.png: expected an 8-bit PNG of one channel"):
        images.read(1)
    labels.write_bytes(labels.read_bytes()[:60])
    with pytest.raises(DataError, match=r"ADE_val_00000001.png"):
        images.read(1)
    labels.unlink()
    with pytest.raises(DataError, match=r"1 of its files are missing: .*ADE_val_00000001.png"):
        open_ade20k(root, "val", incomplete=True)


# The augmentation


def test_the_long_side_is_rounded_half_up():
    assert short_side_size(300, 400, 512) == (512, 683)
    assert short_side_size(400, 300, 512) == (683, 512)
    assert short_side_size(300, 300, 512) == (512, 512)
    assert resize_short_side(np.zeros((30, 40, 3), np.uint8), 15).shape == (15, 20, 3)


def test_nothing_random_is_the_picture_and_labels_stay_on_their_pixels(tmp_path):
    picture, labels = open_ade20k(write_ade(tmp_path), "train", incomplete=True).read(0)
    pixels, seen = ade_augmentation().apply(np.random.default_rng(0), picture, labels)
    np.testing.assert_allclose(pixels * DEVIATION + MEAN, picture / 255, atol=1e-6)
    np.testing.assert_array_equal(seen, labels)
    flipped, mirrored = ade_augmentation(flip_probability=1.0).apply(np.random.default_rng(0), picture, labels)
    np.testing.assert_allclose(flipped, pixels[:, ::-1])
    np.testing.assert_array_equal(mirrored, labels[:, ::-1])


def test_small_pictures_are_padded_at_the_right_and_below_with_the_mean_colour_and_no_label():
    picture, labels = np.full((16, 20, 3), 200, np.uint8), np.zeros((16, 20), np.uint8)
    pixels, seen = ade_augmentation(short_side=16).apply(np.random.default_rng(0), picture, labels)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[16:] == 0).all()
    assert (pixels[:, 20:] == 0).all()
    assert (seen[:16, :20] == 0).all()
    assert (seen == 255).sum() == 32 * 32 - 16 * 20


def test_scales_reach_from_half_to_twice_the_short_side():
    picture, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    augmentation = ade_augmentation(short_side=64, scale=(0.5, 2.0), crop=128)
    rng = np.random.default_rng(0)
    sides = [np.sqrt((augmentation.apply(rng, picture, labels)[1] == 0).sum()) for _ in range(60)]
    assert 32 <= min(sides) < 38
    assert 116 < max(sides) <= 128


def test_crops_that_show_one_class_are_drawn_again():
    """Only a strip at the left has another class: a crop of the first try seldom has enough of it."""
    labels = np.zeros((32, 320), np.uint8)
    labels[:, :24] = 1
    picture = np.zeros((32, 320, 3), np.uint8)
    shares = {}
    for ratio in (1.0, 0.75):
        augmentation, rng = ade_augmentation(category_ratio=ratio), np.random.default_rng(0)
        seen = [augmentation.apply(rng, picture, labels)[1] for _ in range(300)]
        shares[ratio] = np.mean([0.25 < (each == 1).mean() < 0.75 for each in seen])
    # One try finds such a crop with probability 15 / 289, one of ten or of the eleventh, which is not looked at.
    one = shares[1.0]
    assert one == pytest.approx(15 / 289, abs=0.03)
    assert shares[0.75] == pytest.approx(1 - (1 - 15 / 289) ** 11, abs=0.08)


def test_photometric_distortion_changes_half_of_the_pictures_each_way():
    rng = np.random.default_rng(0)
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = np.array([distort_colours(rng, grey)[0, 0] for _ in range(400)])
    assert (values == values[:, :1]).all()  # grey has neither hue nor saturation
    unchanged = (np.abs(values[:, 0] - 100.0) <= 1).mean()  # saturation rounds the grey of 100 down
    assert unchanged == pytest.approx(0.25, abs=0.06)  # neither brightness nor contrast
    assert values.min() < 50
    assert values.max() > 160
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    hues = np.array([distort_colours(rng, red)[0, 0].argmax() for _ in range(400)])
    shares = [np.mean(hues == channel) for channel in range(3)]
    assert shares[0] == pytest.approx(0.5 + 0.5 / 3, abs=0.07)  # the hue turns by any angle, in half of them
    assert shares[1] == pytest.approx(0.5 / 3, abs=0.06)


def test_distortions_cut_fractions_off_as_the_original():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    wide = picture.astype(np.float64)
    np.testing.assert_array_equal(_brightness(picture, -7.625), np.clip(np.floor(wide - 7.625), 0, None))
    np.testing.assert_array_equal(_contrast(picture, 1.3125), np.clip(np.floor(wide * 1.3125), 0, 255))
    grey = np.floor(wide @ [0.2989, 0.587, 0.114])[..., None]
    expected = np.clip(0.5 * wide + 0.5 * grey, 0, 255).astype(np.uint8)
    assert np.abs(_saturation(picture, 0.5).astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(_hue(picture, 0.0), picture)
    turned = _hue(picture, 1 / 3)
    assert np.abs(turned.astype(int) - picture[..., [2, 0, 1]]).max() <= 1  # red becomes green


def test_training_batches_are_a_matter_of_seed_and_step(tmp_path):
    images = open_ade20k(write_ade(tmp_path), "train", incomplete=True)
    data = AdeData((images,), 2, augmentation=ade_augmentation(scale=(0.5, 2.0), distortion=True))
    batch, again = data.dataset(0, 0, 1)[3], data.dataset(0, 0, 1)[3]
    assert batch["frames"].shape == (2, 1, 32, 32, 3)
    assert batch["frames"].dtype == np.float32
    assert batch["labels"].shape == (2, 1, 32, 32)
    assert batch["labels"].dtype == np.uint8
    np.testing.assert_array_equal(batch["frames"], again["frames"])


# The scores


def test_a_perfect_predictor_gets_a_perfect_score_and_a_permuted_one_the_chance(tmp_path):
    """Pictures at their own size under one to two windows, each pixel a patch that tells its class."""
    classes = 6
    root = write_ade(tmp_path, counts=(2, 9), classes=classes)
    protocol = ade20k.build(small(root, evaluate_batch=4), PIXELS)
    view = protocol.validation()
    samples = [view.sample(i) for i in range(9)]
    assert sorted({sample["frames"].shape[1:3] for sample in samples}) == [(32, 32), (32, 51), (45, 32)]
    score = protocol.evaluate(see_pixels, colour_head(), samples).scores[0]
    assert score == {"miou": 1.0, "pixel_accuracy": 1.0, "mean_accuracy": 1.0}
    rng = np.random.default_rng(0)
    permuted = [
        {**sample, "labels": rng.permutation(sample["labels"].ravel()).reshape(sample["labels"].shape)}
        for sample in samples
    ]
    chance = protocol.evaluate(see_pixels, colour_head(), permuted).scores[0]
    assert chance["pixel_accuracy"] == pytest.approx(1 / classes, abs=0.05)
    assert chance["miou"] == pytest.approx(1 / (2 * classes - 1), abs=0.04)
    truth, predicted = (np.concatenate([s["labels"].ravel() for s in some]) for some in (permuted, samples))
    both = (truth != 255) & (predicted != 255)
    assert chance["miou"] == pytest.approx(jaccard_score(truth[both], predicted[both], average="macro"), abs=0.01)


def test_labels_come_out_at_the_size_of_the_file_and_heads_are_scored_apart(tmp_path):
    root = write_ade(tmp_path, sizes=((64, 64), (64, 102)), classes=5)
    config = small(root, learning_rates=(1e-3, 1e-2))
    protocol = ade20k.build(config, PIXELS)
    samples = [protocol.validation().sample(i) for i in range(3)]
    assert samples[1]["frames"].shape == (1, 32, 51, 3)
    assert samples[1]["labels"].shape == (64, 102)
    head = colour_head()
    wrong = jax.tree.map(lambda leaf: leaf, head)
    wrong["params"]["linear"] = jax.tree.map(lambda leaf: -leaf, head["params"]["linear"])
    both = jax.tree.map(lambda *leaves: np.concatenate(leaves), head, wrong)
    scores = protocol.evaluate(see_pixels, both, samples).scores
    assert scores[0]["pixel_accuracy"] > 0.75  # blocks' borders are blurred
    assert scores[1]["pixel_accuracy"] < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mean": "sum"}, "loss_mean: expected one of all, labelled"),
        ({"window": 30}, "window: expected a multiple of the patch, 16 pixels, got 30"),
        ({"window": 64}, "window: expected at most the short side, 32 pixels, got 64"),
        ({"stride": 33}, "stride: expected 1 to 32 pixels"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"augmentation": {"scale": (2.0, 1.0)}}, "augmentation.scale: .*expected .smallest, largest."),
    ],
)
def test_fields_that_cannot_work_are_named(tmp_path, fields, message):
    config = small(write_ade(tmp_path))
    config.update(fields)
    with pytest.raises(ValueError, match=message):
        ade20k.build(config, SimpleNamespace(patch_size=16))


# From end to end


def run(tmp_path, **fields):
    root, model, output = write_ade(tmp_path / "data"), tmp_path / "model", tmp_path / "output"
    random_model(patch_size=8).save(model)
    common = {"checkpoint": str(model), "output": str(output), "compilation_cache": "", "loader__prefetch": 0}
    assert probe(small(root, **common, **fields)) == 0
    return json.loads((output / "probe.json").read_text()), output


def test_a_run_from_the_published_layout_to_scores_and_pictures(tmp_path):
    fields = {"steps": 60, "warmup_steps": 5, "learning_rates": (3e-2,), "log_every": 1, "evaluate_every": 30}
    plain = {"augmentation__distortion": False, "augmentation__scale": (1.0, 1.0)}  # blocks lie on patches
    result, output = run(tmp_path, batch=4, evaluate_batch=3, plots=True, **fields, **plain)
    assert result["data"]["validation"]["images"] == 3
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    assert len(losses) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert result["best"]["pixel_accuracy"] > 0.25  # one of 6 classes at random has 0.17, an untrained head 0.01
    evaluations = json.loads((output / "evaluations.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [30, 60]
    assert result["best"]["miou"] == max(row["scores"][0]["miou"] for row in evaluations)
    assert (output / "plots/segmentation.png").stat().st_size > 5_000


@pytest.mark.parametrize(("best_evaluation", "step", "miou"), [(True, 1, 0.5), (False, 2, 0.3)])
def test_the_best_or_the_last_evaluation_is_reported(tmp_path, monkeypatch, best_evaluation, step, miou):
    falling = iter((0.5, 0.3))
    monkeypatch.setattr(SegmentationProbe, "evaluate", lambda *_: Evaluation([{"miou": next(falling)}]))
    fields = {"steps": 2, "warmup_steps": 1, "evaluate_every": 1, "batch": 2}
    result, _ = run(tmp_path, best_evaluation=best_evaluation, **fields)
    assert (result["step"], result["best"]["miou"]) == (step, miou)
