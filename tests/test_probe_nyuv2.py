"""NYU Depth v2 and the embedded world's depth as linear probes: layout, augmentation, scores, a run from end to end."""

import json
from types import SimpleNamespace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_cases import random_model
from dense_probe_cases import PIXELS, depth_augmentation, recipe, see_pixels, stacked, write_nyu
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.probes import nyuv2 as layout
from omnistream_jax.data.probes.colours import DEVIATION, MEAN
from omnistream_jax.data.probes.depth import DepthData, rotate
from omnistream_jax.data.probes.nyuv2 import open_nyuv2
from omnistream_jax.evals.probes import nyuv2
from omnistream_jax.ops.images import IMAGENET_MEAN, IMAGENET_STD
from omnistream_jax.probe import probe

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (48, 64)


def small(root, **fields):
    return recipe("nyuv2", data=str(root), size=SIZE, augmentation__crop=(32, 48), bins=2, **fields)


# The layout


def test_pictures_come_in_the_order_of_their_sorted_lines_in_metres(tmp_path):
    root = write_nyu(tmp_path / "NYU")
    images = open_nyuv2(tmp_path, "train", size=SIZE, incomplete=True)  # the folder above will do
    assert len(images) == 4
    assert [images.describe(i) for i in range(4)] == [str(root / f"kitchen_train/rgb_{i:05d}.jpg") for i in range(4)]
    frames, depth = images.read(2)
    assert frames.shape == (1, *SIZE, 3)
    assert (frames.dtype, depth.dtype) == (np.uint8, np.float32)
    known = depth[0] > 0
    np.testing.assert_allclose(depth[0][known], frames[0, ..., 0][known] * 0.04, rtol=1e-6)
    assert not known[-1, 0]
    assert images.settings()["images"] == 4
    assert not images.settings()["complete"]


def test_as_many_pictures_as_are_published_are_complete_whatever_is_allowed(tmp_path, monkeypatch):
    root = write_nyu(tmp_path)
    monkeypatch.setattr(layout, "COUNTS", {"train": 4, "test": 3})
    for incomplete in (True, False):
        assert open_nyuv2(root, "test", size=SIZE, incomplete=incomplete).settings()["complete"]


def test_other_counts_than_the_published_ones_are_refused(tmp_path):
    root = write_nyu(tmp_path)
    with pytest.raises(DataError, match=r"nyu_test.txt: 3 pictures, the published list has 654.*allow_incomplete"):
        open_nyuv2(root, "test")
    (root / "nyu_test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"nyu_test.txt: 0 pictures"):
        open_nyuv2(root, "test", incomplete=True)


def test_what_does_not_fit_the_layout_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no nyu_train.txt"):
        open_nyuv2(tmp_path, "train")
    root = write_nyu(tmp_path)
    picture, depth = root / "kitchen_test/rgb_00001.jpg", root / "kitchen_test/sync_depth_00001.png"
    images = open_nyuv2(root, "test", size=SIZE, incomplete=True)
    Image.new("I;16", (20, 10)).save(depth)
    with pytest.raises(DataError, match=r"sync_depth_00001.png: 20 x 10 pixels, expected 64 x 48"):
        images.read(1)
    Image.new("L", SIZE[::-1]).save(depth)
    with pytest.raises(DataError, match=r"sync_depth_00001.png: expected a 16-bit PNG"):
        images.read(1)
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(DataError, match=r"rgb_00001.jpg: expected a whole image"):
        images.read(1)
    depth.unlink()
    with pytest.raises(DataError, match=r"1 of its files are missing: .*sync_depth_00001.png"):
        open_nyuv2(root, "test", incomplete=True)
    (root / "nyu_test.txt").write_text("kitchen/rgb.jpg\n")
    with pytest.raises(DataError, match=r"nyu_test.txt: a line is 'kitchen/rgb.jpg', expected a picture, its depth"):
        open_nyuv2(root, "test", incomplete=True)


# The augmentation


def published(seed=0):
    """A picture of the published size, whose red is its depth in metres, tenfold."""
    red = np.random.default_rng(seed).integers(1, 100, (1, 48, 64), np.uint8).repeat(10, 1).repeat(10, 2)
    return np.stack([red, red, red], -1), red.astype(np.float32) / 10


def test_the_protocols_crops_keep_depth_on_its_pixels():
    frames, depth = published()
    rng = np.random.default_rng(0)
    crops = {"fixed_crop": (43, 45, 608, 472), "crop": (416, 544)}
    augmentation = depth_augmentation(**crops, rotation_probability=0.5, flip_probability=0.5)
    seen = []
    for _ in range(8):
        pixels, target = augmentation.apply(rng, frames, depth, "")
        assert pixels.shape == (1, 416, 544, 3)
        assert target.shape == (1, 416, 544)
        assert (pixels.dtype, target.dtype) == (np.float32, np.float32)
        red = (pixels[..., 0] * DEVIATION[0] + MEAN[0]) * 25.5
        inside = cv2.erode((target[0] > 0).astype(np.uint8), np.ones((3, 3)))
        close = np.abs(red - target)[0][inside > 0] < 0.05
        assert close.mean() > 0.6  # all but the blocks' borders, which a rotation blurs
        seen.append((np.abs(red - target) < 0.05).mean() > 0.99)
    assert 0 < sum(seen) < 8  # some are rotated, some are not


def test_the_fixed_crop_is_the_published_one():
    frames, depth = published()
    augmentation = depth_augmentation(fixed_crop=(43, 45, 608, 472))
    _, target = augmentation.apply(np.random.default_rng(0), frames, depth, "")
    np.testing.assert_array_equal(target, depth[:, 45:472, 43:608])


def test_colours_are_raised_to_gamma_on_the_scale_of_255():
    frames, depth = published()
    factors = {"gamma": (0.95, 0.95), "brightness": (1.2, 1.2), "colour": (0.9, 0.9)}
    changed = depth_augmentation(colour_probability=1.0, **factors)
    pixels, _ = changed.apply(np.random.default_rng(0), frames, depth, "")
    expected = np.clip(frames.astype(np.float64) ** 0.95 * 1.2 * 0.9, 0, 255) / 255
    np.testing.assert_allclose(pixels * DEVIATION + MEAN, expected, atol=1e-6)


def test_nothing_random_leaves_the_view_of_the_validation():
    frames, depth = published()
    pixels, target = depth_augmentation().apply(np.random.default_rng(0), frames, depth, "")
    np.testing.assert_allclose(pixels, (frames / 255 - IMAGENET_MEAN) / IMAGENET_STD, atol=1e-6)
    np.testing.assert_array_equal(target, depth)
    flipped = depth_augmentation(flip_probability=1.0).apply(np.random.default_rng(0), frames, depth, "")
    np.testing.assert_array_equal(flipped[1], depth[:, :, ::-1])
    np.testing.assert_allclose(flipped[0], pixels[:, :, ::-1])


def test_rotation_is_about_the_centre():
    square = np.random.default_rng(0).random((9, 9)).astype(np.float32)
    for interpolation in (cv2.INTER_LINEAR, cv2.INTER_NEAREST):
        np.testing.assert_allclose(rotate(square, 90, interpolation), np.rot90(square), atol=1e-5)
    turned = rotate(np.full((48, 64), 3.0, np.float32), 2.5, cv2.INTER_NEAREST)
    assert set(np.unique(turned)) == {0.0, 3.0}  # beyond the border nothing is known
    assert (turned[8:40, 8:56] == 3).all()


def test_augmentation_refuses_what_cannot_be():
    with pytest.raises(DataError, match="gamma: "):
        depth_augmentation(gamma=(1.1, 0.9))
    with pytest.raises(DataError, match="fixed_crop: "):
        depth_augmentation(fixed_crop=(43, 45, 700, 472))
    with pytest.raises(DataError, match="rotation_probability: "):
        depth_augmentation(rotation_probability=1.5)
    with pytest.raises(DataError, match=r"picture.png: 64 x 48 pixels to crop 544 x 416 of"):
        depth_augmentation(crop=(416, 544)).apply(
            np.random.default_rng(0),
            np.zeros((1, 48, 64, 3), np.uint8),
            np.ones((1, 48, 64), np.float32),
            "picture.png",
        )


def test_training_batches_are_a_matter_of_seed_and_step(tmp_path):
    images = open_nyuv2(write_nyu(tmp_path), "train", size=SIZE, incomplete=True)
    changes = {"crop": (32, 48), "flip_probability": 0.5, "colour_probability": 0.5}
    data = DepthData((images,), 2, augmentation=depth_augmentation(**changes))
    batch = data.dataset(0, 0, 1)[3]
    assert batch["frames"].shape == (2, 1, 32, 48, 3)
    assert batch["depth"].shape == (2, 1, 32, 48)
    again, other = data.dataset(0, 0, 1)[3], data.dataset(1, 0, 1)[3]
    np.testing.assert_array_equal(batch["frames"], again["frames"])
    assert not np.array_equal(batch["depth"], other["depth"])


# The scores


def depth_head():
    """Of two bins at 0.001 and 10 m: features that are their weights but for the floor of 0.1."""
    return stacked({"linear": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}, 2)


@jax.tree_util.Partial
def see_depth(frames):
    """Weights of the two bins such that the depth is 40 mm a step of red."""
    far = 50 * (see_pixels(frames).patches[..., 0] * 0.04 - 0.001) / 9.999
    return SimpleNamespace(patches=jnp.stack([50 - far, far], -1) - 0.1)


def test_a_perfect_predictor_gets_a_perfect_score_and_a_permuted_one_the_spread(tmp_path):
    protocol = nyuv2.build(small(write_nyu(tmp_path, counts=(2, 8))), PIXELS)
    view = protocol.validation()
    samples = [view.sample(i) for i in range(len(view))]
    score = protocol.evaluate(see_depth, depth_head(), samples).scores[0]
    assert score["rmse"] < 1e-4
    assert score["abs_rel"] < 1e-4
    assert score["a1"] == 1
    permuted = [{**one, "depth": other["depth"]} for one, other in zip(samples, samples[1:] + samples[:1], strict=True)]
    expected = []
    for one, other in zip(samples, permuted, strict=True):
        inside = np.s_[4:47, 4:60]
        predicted, true = (each["depth"][0][inside].astype(float) for each in (one, other))
        expected.append(np.sqrt(np.mean((predicted - true)[true > 0] ** 2)))
    red = protocol.evaluate(see_depth, depth_head(), permuted).scores[0]
    assert red["rmse"] == pytest.approx(np.mean(expected), rel=0.05)  # unknown corners are known to the predictor
    assert red["rmse"] > 100 * score["rmse"]


def test_flipping_averages_both_views_and_the_other_score_stays(tmp_path):
    """An encoder that is wrong on the left half alone: the mean of both views is half as wrong everywhere."""

    @jax.tree_util.Partial
    def lopsided(frames):
        exact = see_depth(frames).patches
        middle = frames.shape[3] // 2
        return SimpleNamespace(patches=exact.at[..., :middle, 0].add(-2.0).at[..., :middle, 1].add(2.0))

    root = write_nyu(tmp_path)
    both = nyuv2.build(small(root, crop="none"), PIXELS)
    samples = [both.validation().sample(i) for i in range(3)]
    score = both.evaluate(lopsided, depth_head(), samples).scores[0]
    wrong = 2 * 9.999 / 50
    assert score["rmse"] == pytest.approx(wrong / 2, rel=1e-3)
    plain = (
        nyuv2.build(small(root, crop="none", flip=False), PIXELS).evaluate(lopsided, depth_head(), samples).scores[0]
    )
    assert plain["rmse"] == pytest.approx(score["rmse_one_view"], rel=1e-6)
    assert plain["rmse"] > 1.3 * score["rmse"]
    assert set(plain) == {"rmse", "abs_rel", "a1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "garg"}, "crop: expected one of eigen, none"),
        ({"min_depth": 20.0}, "max_depth: expected above min_depth"),
        ({"bins": 1}, "bins: expected 2 or more"),
        ({"images_per_loss": 3}, r"images_per_loss: expected a divisor of batch \(16\), got 3"),
        ({"data": "embedded"}, "data: the embedded world is the recipe world_depth's"),
    ],
)
def test_fields_that_cannot_work_are_named(tmp_path, fields, message):
    config = small(write_nyu(tmp_path))
    config.update(fields)
    with pytest.raises(ValueError, match=message):
        nyuv2.build(config, PIXELS)


def test_a_head_that_diverged_has_no_score_and_the_others_keep_theirs(tmp_path):
    protocol = nyuv2.build(small(write_nyu(tmp_path), learning_rates=(1e-3, 1e-2)), PIXELS)
    both = jax.tree.map(lambda leaf: jnp.concatenate([leaf * jnp.nan, leaf]), depth_head())
    scores = protocol.evaluate(see_depth, both, [protocol.validation().sample(0)]).scores
    assert np.isnan(scores[0]["rmse"])
    assert scores[1]["rmse"] < 1e-4


# From end to end


def run(tmp_path, folder, name="nyuv2", **fields):
    model = tmp_path / "model"
    if not model.exists():
        random_model(patch_size=8).save(model)
    output = tmp_path / folder
    options = {"checkpoint": str(model), "output": str(output), "compilation_cache": "", "loader__prefetch": 0}
    assert probe(recipe(name, **options, **fields)) == 0
    return json.loads((output / "probe.json").read_text()), output


def test_a_run_from_the_published_layout_to_scores_and_pictures(tmp_path):
    root = write_nyu(tmp_path / "data")
    fields = {"data": str(root), "size": SIZE, "augmentation__crop": (32, 48), "bins": 16, "plots": True}
    fields |= {"steps": 6, "warmup_steps": 2, "batch": 4, "evaluate_batch": 2, "learning_rates": (1e-3, 1e-2)}
    result, output = run(tmp_path, "nyu", variance_from=3, **fields)
    assert result["data"]["validation"]["images"] == 3
    assert result["data"]["train"]["expected_images"] == 24_231
    assert len(result["heads"]) == 2
    assert (output / "plots/depth.png").stat().st_size > 5_000
    damaged = root / "kitchen_test/rgb_00001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DataError, match=r"rgb_00001.jpg"):
        run(tmp_path, "again", **fields)


def test_the_worlds_depth_is_learned_from_features_that_show_it(tmp_path):
    """Pixels of a random tiny backbone: after some steps the error is below that of the best constant."""
    fields = {"name": "world_depth", "scenes": 48, "heldout_scenes": 12, "size": 32}
    fields |= {"steps": 150, "warmup_steps": 20, "batch": 16}
    result, _ = run(tmp_path, "world", **fields, learning_rates=(1e-2,))
    view = nyuv2.build(recipe(**fields), SimpleNamespace(patch_size=8)).view
    depths = [view.sample(i)["depth"] for i in range(12)]
    constant = np.mean([np.sqrt(np.mean((depth - np.mean(depths)) ** 2)) for depth in depths])
    assert result["best"]["rmse"] < 0.95 * constant
    assert result["data"]["validation"]["world"]["split"] == "heldout"


def test_world_depth_in_training_views_has_clips(tmp_path):
    config = recipe("world_depth", scenes=4, heldout_scenes=2, frames=3, size=32, batch=2, augment=True)
    protocol = nyuv2.build(config, SimpleNamespace(patch_size=8))
    batch = protocol.train_data().dataset(0, 0, 1)[0]
    assert batch["frames"].shape == (2, 3, 32, 32, 3)
    assert batch["depth"].shape == (2, 3, 32, 32)
    sample = protocol.validation().sample(1)
    assert sample["frames"].shape == (3, 32, 32, 3)
    assert sample["depth"].min() > 0
