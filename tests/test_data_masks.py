"""Masks against the statistics of V-JEPA 2's own generator and a plain reference of DINOv3's."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.masks import image_block_masks, tube_block_masks, tube_masks

GOLDEN = json.loads((Path(__file__).parent / "data" / "08b_vjepa2_multiblock_masks.json").read_text())
TUBE_CASES = GOLDEN["statistics_1500_draws"]


@pytest.mark.parametrize("case", TUBE_CASES)
def test_tube_ratios_agree_with_v_jepa_2(case):
    expected = TUBE_CASES[case]
    _, height, width = expected["grid"]
    parameters = GOLDEN["parameters"]["short" if case.startswith("short") else "long"]
    blocks, share = parameters["num_blocks"], parameters["spatial_scale"][0]
    rng = np.random.default_rng(0)
    masks = np.concatenate([tube_block_masks(rng, 1, height, width, blocks, share) for _ in range(3000)])
    ratios = masks.mean(axis=(1, 2))
    # The golden draws kept the few masks (about 1 %, long range only) that leave nothing visible: mean and spread
    # move by less than 0.003. Its standard error over 1,500 draws is 0.002.
    assert ratios.mean() == pytest.approx(expected["mask_ratio_mean"], abs=0.009)
    assert ratios.std() == pytest.approx(expected["mask_ratio_std"], abs=0.006)
    assert np.percentile(ratios, 5) == pytest.approx(expected["mask_ratio_p05"], abs=0.015)
    assert np.percentile(ratios, 95) == pytest.approx(expected["mask_ratio_p95"], abs=0.02)
    # The golden's extremes of 1,500 draws lie as far out here: at most 7 of 1,500 draws beyond them, none by 0.1.
    assert (ratios < expected["mask_ratio_min"]).mean() * 1500 < 7
    assert (ratios > expected["mask_ratio_max"]).mean() * 1500 < 7
    assert ratios.min() == pytest.approx(expected["mask_ratio_min"], abs=0.1)
    assert ratios.max() == pytest.approx(expected["mask_ratio_max"], abs=0.1)
    assert ratios.max() < 1


@pytest.mark.parametrize("case", TUBE_CASES)
def test_tube_blocks_have_the_sides_of_v_jepa_2(case):
    expected = TUBE_CASES[case]
    _, height, width = expected["grid"]
    share = 0.15 if case.startswith("short") else 0.7
    rng = np.random.default_rng(1)
    singles = [tube_block_masks(rng, 1, height, width, 1, share)[0] for _ in range(800)]  # one block: its own sides
    sides_y = [int(mask.any(axis=1).sum()) for mask in singles]
    sides_x = [int(mask.any(axis=0).sum()) for mask in singles]
    assert [min(sides_y), max(sides_y)] == expected["block_h"]
    assert [min(sides_x), max(sides_x)] == expected["block_w"]


def test_tubes_are_equal_over_time_and_leave_something_visible():
    masks = tube_masks(np.random.default_rng(2), 500, 3, 4, 4)
    assert masks.shape == (500, 3, 4, 4)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, np.repeat(masks[:, :1], 3, axis=1))
    assert not masks.all(axis=(1, 2, 3)).any()
    assert masks.any(axis=(1, 2, 3)).all()


def test_tube_scheme_is_chosen_per_batch_half_of_the_time_each():
    ratios = [tube_masks(np.random.default_rng(seed), 32, 1, 14, 14).mean() for seed in range(400)]
    long_range = np.mean(np.array(ratios) > 0.72)  # batch means: about 0.63 and 0.81
    assert long_range == pytest.approx(0.5, abs=0.1)


def test_tubes_on_a_single_patch_are_refused():
    with pytest.raises(DataError, match="leave nothing visible of 1 x 1 patches"):
        tube_masks(np.random.default_rng(0), 2, 1, 1, 1)


def test_block_masks_have_the_exact_counts_of_dinov3():
    masks = image_block_masks(np.random.default_rng(3), 33, 14, 14)
    expected = [int(196 * (0.1 + 0.4 * (index + 1) / 16)) for index in range(16)] + [0] * 17
    assert sorted(masks.sum(axis=(1, 2)).tolist()) == sorted(expected)
    first = image_block_masks(np.random.default_rng(4), 33, 14, 14)[:16].any(axis=(1, 2))
    assert 0 < first.sum() < 16  # shuffled over the batch


def test_block_mask_options():
    none = image_block_masks(np.random.default_rng(0), 8, 8, 8, probability=0.0)
    assert not none.any()
    full = image_block_masks(np.random.default_rng(0), 8, 8, 8, probability=1.0, ratio=(0.25, 0.25))
    assert full.sum(axis=(1, 2)).tolist() == [16] * 8


def test_rows_of_block_masks_do_not_depend_on_which_are_made():
    whole = image_block_masks(np.random.default_rng(5), 12, 8, 8)
    part = image_block_masks(np.random.default_rng(5), 12, 8, 8, rows=[1, 4, 10])
    np.testing.assert_array_equal(part, whole[[1, 4, 10]])


def _borders(mask: np.ndarray) -> int:
    """Pairs of neighbouring patches of which one is masked: small for blocks, large for scattered patches."""
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def _reference_mask(source: random.Random, side: int, patches: int) -> np.ndarray:
    """DINOv3's block masking, written from its description with sets of cells."""
    masked: set[tuple[int, int]] = set()
    stuck = False
    while len(masked) < patches and not stuck:
        budget = min(patches - len(masked), side * side // 2)
        stuck = True
        for _ in range(10):
            area = source.uniform(4, budget)
            aspect = math.exp(source.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall >= side or wide >= side:
                continue
            top, left = source.randint(0, side - tall), source.randint(0, side - wide)
            cells = {(top + i, left + j) for i in range(tall) for j in range(wide)} - masked
            if 0 < len(cells) <= budget:
                masked |= cells
                stuck = False
                break
    free = [(i, j) for i in range(side) for j in range(side) if (i, j) not in masked]
    masked |= set(source.sample(free, patches - len(masked)))
    out = np.zeros((side, side), bool)
    for cell in masked:
        out[cell] = True
    return out


@pytest.mark.parametrize(("side", "ratio"), [(14, 0.3), (14, 0.5), (8, 0.2)])
def test_blocks_have_the_shape_of_the_reference(side, ratio):
    patches = int(side * side * ratio)
    ours = image_block_masks(np.random.default_rng(6), 600, side, side, probability=1.0, ratio=(ratio, ratio))
    source = random.Random(7)
    reference = np.stack([_reference_mask(source, side, patches) for _ in range(600)])
    assert (ours.sum(axis=(1, 2)) == patches).all()
    ours_borders, reference_borders = [[_borders(mask) for mask in masks] for masks in (ours, reference)]
    error = math.sqrt((np.var(ours_borders) + np.var(reference_borders)) / 600)
    assert abs(np.mean(ours_borders) - np.mean(reference_borders)) < 4 * error
    # How often each patch is masked: less at the border, in the same way.
    difference = ours.mean(axis=0) - reference.mean(axis=0)
    assert abs(difference).max() < 4.5 * math.sqrt(2 * 0.25 / 600)
    scattered = np.random.default_rng(8).permuted(ours.reshape(600, -1), axis=1).reshape(ours.shape)
    assert np.mean(ours_borders) < 0.75 * np.mean([_borders(mask) for mask in scattered])
