"""Depth and cameras on held-out scenes of the embedded world, beside what needs no learning."""

from collections.abc import Callable

import numpy as np

from omnistream_jax.data.world import WorldClips
from omnistream_jax.evals.depth_metrics import sequence_depth_metrics
from omnistream_jax.geometry.alignment import apply_similarity, umeyama
from omnistream_jax.geometry_model import Reconstruction

Reconstruct = Callable[[np.ndarray], Reconstruction]
_BATCH = 8  # scenes at once


def world_geometry(reconstruct: Reconstruct, clips: WorldClips) -> dict[str, float]:
    """Scores of a model on every scene; lengths in metres after the alignment.

    Args:
        reconstruct: frames uint8 [B, T, H, W, 3] -> their geometry.
        clips: the scenes; each is one sequence of `clips.frames` frames.

    Returns:
        depth_abs_rel: mean over sequences, one scale a sequence (the ten reweighted iterations of video depth).
        depth_abs_rel_constant: of the best constant depth of each sequence.
        depth_abs_rel_context, depth_abs_rel_alone: of the last frame seen after all others, and seen alone; one scale
            each.
        ate: root mean square error of the camera's place after a similarity, by the camera head.
        ate_rays: the same by the ray maps.
        ate_still: of a camera that stands still at the best place.
        ate_straight: of a camera that goes straight at constant speed, from the best place along the best line.
    """
    rows = []
    for start in range(0, len(clips), _BATCH):
        worlds = [clips.clip(index) for index in range(start, min(start + _BATCH, len(clips)))]
        frames = np.stack([world.images for world in worlds])
        whole, alone = reconstruct(frames), reconstruct(frames[:, -1:])
        depth, last = np.asarray(whole.depth), np.asarray(alone.depth)
        poses, from_rays = np.asarray(whole.cam_to_world), np.asarray(whole.cameras_from_rays()[0])
        for index, world in enumerate(worlds):
            centres = world.cam_to_world[:, :3, 3].astype(np.float64)
            rows.append(
                {
                    "depth_abs_rel": _abs_rel(depth[index], world.depth),
                    "depth_abs_rel_constant": _best_constant(world.depth),
                    "depth_abs_rel_context": _abs_rel(depth[index, -1:], world.depth[-1:]),
                    "depth_abs_rel_alone": _abs_rel(last[index], world.depth[-1:]),
                    "ate": _ate(poses[index, :, :3, 3].astype(np.float64), centres),
                    "ate_rays": _ate(from_rays[index, :, :3, 3].astype(np.float64), centres),
                    "ate_still": _spread(centres),
                    "ate_straight": _off_line(centres),
                }
            )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _abs_rel(prediction: np.ndarray, target: np.ndarray) -> float:
    return sequence_depth_metrics(prediction, target, align="scale", max_depth=None, clip_prediction=None).abs_rel


def _ate(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Of camera centres [T, 3]; defined also where a line or a point leaves the rotation open."""
    if _spread(estimate) < 1e-9:
        return _spread(reference)
    aligned = apply_similarity(umeyama(estimate, reference), estimate)
    return float(np.sqrt(np.square(aligned - reference).sum(1).mean()))


def _spread(centres: np.ndarray) -> float:
    return float(np.sqrt(np.square(centres - centres.mean(0)).sum(1).mean()))


def _off_line(centres: np.ndarray) -> float:
    """Of the straight line at constant speed that comes closest to centres [T, 3]."""
    design = np.stack([np.ones(len(centres)), np.arange(len(centres))], axis=1)
    line = design @ np.linalg.lstsq(design, centres, rcond=None)[0]
    return float(np.sqrt(np.square(centres - line).sum(1).mean()))


def _best_constant(target: np.ndarray) -> float:
    """The smallest mean |c - d| / d of any constant c: c is the median of the depths weighted by 1 / d."""
    depth = np.sort(target.ravel().astype(np.float64))
    weight = np.cumsum(1 / depth)
    constant = depth[np.searchsorted(weight, weight[-1] / 2)]
    return float(np.mean(np.abs(constant - depth) / depth))
