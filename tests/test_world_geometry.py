"""The scores on held-out scenes, for reconstructions whose errors are known."""

import dataclasses

import numpy as np
import pytest

from omnistream_jax.data.world import WorldClips
from omnistream_jax.evals.world_geometry import world_geometry
from omnistream_jax.geometry_model import Reconstruction

CLIPS = WorldClips("heldout", 3, frames=4, size=32)


class Known(Reconstruction):
    """A reconstruction whose rays give the cameras of the head."""

    def cameras_from_rays(self):
        return self.cam_to_world, self.intrinsics


def reconstruct_truly(frames: np.ndarray) -> Reconstruction:
    """The truth about the scenes that the frames show, found by their last frame."""
    worlds = [CLIPS.clip(index) for index in range(len(CLIPS))]
    shown = [next(world for world in worlds if np.array_equal(world.images[-1], clip[-1])) for clip in frames]
    count = frames.shape[1]
    depth = np.stack([world.depth[-count:] for world in shown])
    poses = np.stack([world.cam_to_world[-count:] for world in shown])
    nothing = np.zeros(1)
    return Known(depth, nothing, nothing, nothing, poses, nothing)


def test_the_truth_scores_zero_and_the_still_camera_does_not():
    scores = world_geometry(reconstruct_truly, CLIPS)
    for name in ("depth_abs_rel", "depth_abs_rel_context", "depth_abs_rel_alone", "ate", "ate_rays"):
        assert scores[name] == pytest.approx(0.0, abs=1e-5), name
    assert scores["ate_still"] > 0.1
    assert scores["depth_abs_rel_constant"] > 0.1
    assert 0.001 < scores["ate_straight"] < scores["ate_still"]


def test_the_scale_of_a_scene_is_free_and_a_known_error_is_found():
    def too_far(frames: np.ndarray) -> Reconstruction:
        truth = reconstruct_truly(frames)
        depth = 3.0 * truth.depth * np.where(np.arange(32) < 16, 1.25, 1.0)  # the left half, against the right one
        return dataclasses.replace(truth, depth=depth)

    assert world_geometry(reconstruct_truly, CLIPS)["depth_abs_rel"] == pytest.approx(0.0, abs=1e-5)
    # Whichever scale is best, the halves stay 1.25 apart: errors e and e' with (1 + e) = 1.25 (1 - e').
    assert 0.1 < world_geometry(too_far, CLIPS)["depth_abs_rel"] < 0.13


def test_a_camera_that_stands_still_scores_as_such():
    def still(frames: np.ndarray) -> Reconstruction:
        truth = reconstruct_truly(frames)
        return dataclasses.replace(truth, cam_to_world=np.broadcast_to(np.eye(4), truth.cam_to_world.shape))

    scores = world_geometry(still, CLIPS)
    assert scores["ate"] == pytest.approx(scores["ate_still"])
