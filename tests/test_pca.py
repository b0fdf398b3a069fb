"""The PCA picture: regions with unlike features get unlike colours, reproducibly."""

import numpy as np
import pytest

from omnistream_jax.evals.pca import pca_picture, principal_colours
from omnistream_jax.evals.rows import GAP, LABEL_HEIGHT

FRAMES = np.random.default_rng(0).integers(0, 256, size=(3, 32, 48, 3), dtype=np.uint8)


def two_regions(noise=0.0):
    """Features [3, 4, 6, 16]: one vector on the left half, another on the right."""
    generator = np.random.default_rng(1)
    left, right = generator.normal(size=(2, 16))
    features = np.where(np.arange(6)[:, None] < 3, left, right) * np.ones((3, 4, 1, 1))
    return features + noise * generator.normal(size=features.shape)


def tile(picture, row, column):
    top = row * (LABEL_HEIGHT + 32 + GAP) + LABEL_HEIGHT
    left = column * (48 + GAP)
    return picture[top : top + 32, left : left + 48]


def test_two_regions_get_two_colours_in_every_frame():
    picture = pca_picture(FRAMES, {"backbone": two_regions()})
    for column in range(3):
        drawn = tile(picture, 1, column)
        left, right = drawn[:, :24].reshape(-1, 3), drawn[:, 24:].reshape(-1, 3)
        assert len(np.unique(left, axis=0)) == len(np.unique(right, axis=0)) == 1
        assert np.abs(left[0].astype(int) - right[0]).max() == 255
        # One direction tells two regions apart; the others carry nothing and are not blown up.
        np.testing.assert_array_equal(left[0][1:], [128, 128])


def test_frames_and_one_row_per_map_with_its_name_are_drawn():
    picture = pca_picture(FRAMES, {"untrained": two_regions(0.5), "trained": two_regions()[:, :2, :3]})
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * (LABEL_HEIGHT + 32 + GAP), 3 * 48 + 2 * GAP, 3)
    for column in range(3):
        np.testing.assert_array_equal(tile(picture, 0, column), FRAMES[column])
    strips = [picture[row * (LABEL_HEIGHT + 32 + GAP) :][:LABEL_HEIGHT] for row in range(3)]
    assert all((strip < 128).any() for strip in strips)
    assert not np.array_equal(strips[1], strips[2])


def test_colours_are_the_components_of_a_singular_value_decomposition():
    features = np.random.default_rng(2).normal(size=(3, 8, 8, 12)) * np.linspace(3, 0.5, 12)
    colours = principal_colours(features).reshape(-1, 3).astype(float)
    vectors = features.reshape(-1, 12)
    left, singular_values, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    scores = left * singular_values
    for component in range(3):
        inside = (colours[:, component] > 0) & (colours[:, component] < 255)
        correlation = np.corrcoef(colours[inside, component], scores[inside, component])[0, 1]
        assert abs(correlation) > 0.9999


@pytest.mark.parametrize("seed", range(4))
def test_each_colour_rises_with_the_feature_that_weighs_most_in_it(seed):
    # Channels of unlike variance are nearly the principal axes, each with one dominant loading.
    deviations = np.random.default_rng(seed).permutation([8.0, 4.0, 2.0, 0.1, 0.1])
    features = np.random.default_rng(seed + 10).normal(size=(2, 16, 16, 5)) * deviations
    colours = principal_colours(features)
    for component, channel in enumerate(np.argsort(-deviations)[:3]):
        correlation = np.corrcoef(colours[..., component].ravel(), features[..., channel].ravel())[0, 1]
        assert correlation > 0.9


def test_constant_and_narrow_features_are_drawn_flat():
    np.testing.assert_array_equal(principal_colours(np.full((2, 3, 3, 8), 0.7)), 128)
    narrow = principal_colours(np.random.default_rng(4).normal(size=(2, 3, 3, 2)))
    np.testing.assert_array_equal(narrow[..., 2], 128)
    assert narrow[..., :2].std() > 10


@pytest.mark.parametrize(
    ("frames", "features", "message"),
    [
        (FRAMES.astype(np.float32), two_regions(), "frames: expected uint8"),
        (FRAMES, two_regions()[:2], r"feature_maps\['a'\]: expected \[3, h, w, D\]"),
        (FRAMES, np.full((3, 2, 2, 4), np.inf), "finite"),
    ],
)
def test_bad_input_is_named(frames, features, message):
    with pytest.raises(ValueError, match=message):
        pca_picture(frames, {"a": features})
