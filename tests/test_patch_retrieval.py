"""Patch retrieval: perfect for features that follow the content, chance for those that do not."""

import numpy as np
import pytest

from omnistream_jax.evals.patch_retrieval import Crop, matching_cells, patch_retrieval, second_view

HEIGHT, WIDTH, PATCH = 128, 160, 16
GRID = (HEIGHT // PATCH, WIDTH // PATCH)


def position_frames(count):
    """Frames whose red says how far right, and whose green says how far down, a pixel is."""
    y, x = np.meshgrid((np.arange(HEIGHT) + 0.5) / HEIGHT, (np.arange(WIDTH) + 0.5) / WIDTH, indexing="ij")
    frame = np.stack([255 * x, 255 * y, np.zeros_like(x)], axis=-1)
    return np.repeat(np.rint(frame).astype(np.uint8)[None], count, axis=0)


def position_code(x, y):
    """Gaussian bumps around every cell centre: the nearest code by cosine is the nearest cell."""
    rows, columns = GRID
    centre_y, centre_x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    squares = (x[..., None] * columns - centre_x.ravel()) ** 2 + (y[..., None] * rows - centre_y.ravel()) ** 2
    return np.exp(-squares / 2)


def content_features(frames):
    """The position code of each patch's mean colour, read from the pixels."""
    patches = frames.reshape(len(frames), GRID[0], PATCH, GRID[1], PATCH, 3).mean(axis=(2, 4)) / 255
    return position_code(patches[..., 0], patches[..., 1])


def place_features(frames):
    """The position code of each patch's own place, whatever it shows."""
    return content_features(position_frames(len(frames)))


def test_features_carried_through_the_warp_score_perfectly():
    scores = patch_retrieval(content_features, position_frames(20), photometric=0.0)
    assert scores["retrieval_within1"] == 100
    # A centre on the border of two cells may go either way, for colours are rounded.
    assert scores["retrieval_top1"] > 96


def test_random_features_score_at_chance():
    generator = np.random.default_rng(0)
    scores = patch_retrieval(lambda frames: generator.normal(size=(len(frames), *GRID, 32)), position_frames(60))
    cells = GRID[0] * GRID[1]
    # The mean number of cells within 1, borders counted: (3 h - 2)(3 w - 2) / (h w) if matches were uniform;
    # they lean to the middle, so it is between that and 9.
    low, high = (3 * GRID[0] - 2) * (3 * GRID[1] - 2) / cells**2, 9 / cells
    assert abs(scores["retrieval_top1"] - 100 / cells) < 0.6
    assert 100 * low - 1 < scores["retrieval_within1"] < 100 * high + 1


def test_knowing_only_the_place_in_the_frame_does_not_score():
    assert patch_retrieval(place_features, position_frames(20))["retrieval_top1"] < 10


def test_matches_of_a_whole_flipped_frame_are_mirrored_columns():
    matches = matching_cells(Crop(0, 0, 64, 96), (64, 96), (4, 6))
    assert matches[1, 0].tolist() == [1, 5]
    assert matches[3, 4].tolist() == [3, 1]


def test_matches_of_a_crop_are_those_worked_out_by_hand():
    # Patches of 16 pixels; the crop covers x 32..80 and y 8..40, so a patch of view 2 is 8 pixels of view 1.
    matches = matching_cells(Crop(top=8, left=32, height=32, width=48), (64, 96), (4, 6))
    # Centres y: 12, 20, 28, 36; x, flipped: 76, 68, 60, 52, 44, 36.
    assert matches[:, 0, 0].tolist() == [0, 1, 1, 2]
    assert matches[0, :, 1].tolist() == [4, 4, 3, 3, 2, 2]


def test_second_view_shows_the_flipped_crop_with_other_light():
    frame = position_frames(1)[0]
    view, crop = second_view(frame, np.random.default_rng(3), photometric=0.0)
    assert view.shape == frame.shape
    assert 0.5 <= crop.height * crop.width / (HEIGHT * WIDTH) <= 0.8
    assert 0 <= crop.top <= HEIGHT - crop.height
    assert 0 <= crop.left <= WIDTH - crop.width
    # The middle of the left edge of view 2 shows the middle of the right edge of the crop.
    right = (crop.left + crop.width) / WIDTH
    middle = (crop.top + crop.height / 2) / HEIGHT
    np.testing.assert_allclose(view[HEIGHT // 2, 0, :2] / 255, [right, middle], atol=0.02)
    lit, same_crop = second_view(frame, np.random.default_rng(3))
    assert same_crop == crop
    difference = np.abs(lit.astype(int) - view).mean()
    assert 1 < difference < 60


def test_scores_are_reproducible_and_depend_on_the_seed():
    frames = np.random.default_rng(1).integers(0, 256, size=(3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    scores = patch_retrieval(content_features, frames, seed=5)
    assert patch_retrieval(content_features, frames, seed=5) == scores
    assert patch_retrieval(content_features, frames, seed=6) != scores
    views = []
    patch_retrieval(lambda given: views.append(given) or content_features(given), frames, seed=5)
    patch_retrieval(lambda given: views.append(given) or content_features(given), frames[:2], seed=5)
    np.testing.assert_array_equal(views[1][:2], views[3])


@pytest.mark.parametrize(
    ("features", "frames", "message"),
    [
        (content_features, np.zeros((1, 32, 32, 3), np.float32), "frames: expected uint8"),
        (lambda frames: np.zeros((len(frames), 4, 8)), position_frames(1), "features_fn: expected features"),
        (lambda frames: np.full((len(frames), 4, 4, 2), np.nan), position_frames(1), "finite"),
    ],
)
def test_bad_input_is_named(features, frames, message):
    with pytest.raises(ValueError, match=message):
        patch_retrieval(features, frames)
