"""What the README's first command must have shown, where it has been run in this checkout (as .ci/run does)."""

import math

import numpy as np
import pytest
from PIL import Image
from training_cases import PRETRAIN, REPOSITORY

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax.utils.metrics import read_metrics

WORKDIR = REPOSITORY / "runs" / "quickstart"
TERMS = ("dino_global", "dino_local", "ibot_image", "ibot_clip", "koleo", "gram")
GEOMETRY = ("depth", "rays", "points", "camera")


@pytest.fixture(scope="module")
def rows():
    config = config_lib.load(PRETRAIN)
    path = WORKDIR / "metrics.jsonl"
    found = read_metrics(path) if path.exists() else []
    if not found or found[-1]["step"] != config.steps:
        pytest.skip(f"{path}: no finished quick start here; the README's first command makes one")
    return found


def steps_of(rows):
    return [row for row in rows if "loss" in row]


def test_the_loss_falls(rows):
    losses = [row["loss"] for row in steps_of(rows)]
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert np.mean(losses[-5:]) < np.mean(losses[1:6])


def test_every_term_is_finite_and_moves(rows):
    for term in TERMS + GEOMETRY:
        values = [row[term] for row in steps_of(rows)]
        assert np.isfinite(values).all(), term
        assert len(set(values)) > 10, term


def test_the_teacher_does_not_collapse(rows):
    prototypes = config_lib.load(PRETRAIN).self_supervision.prototypes
    for row in steps_of(rows):
        for kind in ("image", "clip"):
            assert row[f"teacher_entropy_{kind}"] > 0.3 * math.log(prototypes)


def test_patches_are_found_again_ten_points_more_often_than_before_training(rows):
    final = rows[-1]
    assert final["retrieval_within1_trained"] >= final["retrieval_within1_untrained"] + 10
    assert final["retrieval_top1_trained"] > final["retrieval_top1_untrained"]


def test_depth_and_cameras_beat_what_needs_no_learning(rows):
    final = rows[-1]
    assert final["depth_abs_rel"] < 0.8 * final["depth_abs_rel_constant"]
    assert final["ate_rays"] < 0.95 * final["ate_still"]


def test_captions_become_likelier(rows):
    losses = [row["caption"] for row in steps_of(rows)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert {"attribute_accuracy", "box_iou", "attribute_accuracy_blind", "box_iou_blind"} <= set(rows[-1])


def test_the_picture_and_the_model_are_there(rows):
    assert Image.open(WORKDIR / "features.png").size[0] > 1000
    assert Image.open(WORKDIR / "geometry.png").size[0] > 500
    assert Image.open(WORKDIR / "captions.png").size[0] > 500
    model = omnistream_jax.load(WORKDIR / "model")
    out = model.encode(np.zeros((1, 2, 32, 32, 3), np.uint8))
    assert np.isfinite(out.patches).all()
    language = omnistream_jax.load_language(WORKDIR / "model")
    (text,) = language.answer(np.zeros((1, 64, 64, 3), np.uint8), ["Describe the image."], max_tokens=32)
    assert text.strip()
