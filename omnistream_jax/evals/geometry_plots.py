"""Pictures of what the geometry evaluators score: depth with its error, trajectories with the truth."""

from pathlib import Path

import numpy as np

from omnistream_jax.evals.camera_pose import PoseResult
from omnistream_jax.evals.figures import new_figure, save_figure
from omnistream_jax.evals.video_depth import DepthResult

_LARGEST_ERROR = 0.5  # of AbsRel, at the end of the colours
_TRUTH, _ESTIMATE = "black", "tab:red"


def plot_depth(result: DepthResult, path: Path) -> None:
    """Writes a PNG: a row for each shown frame with the picture, the truth, the aligned prediction and its error.

    Args:
        result: of `evaluate_video_depth` with `show` above 0.
        path: written aside, then renamed; its folder exists.
    """
    shown, metrics = result.shown, result.metrics
    height, width = shown[0].target.shape
    figure = new_figure((14, max(2.0, 3.2 * height / width) * len(shown) + 0.8))
    axes = figure.subplots(len(shown), 4, squeeze=False)
    truth = np.concatenate([frame.target[np.isfinite(frame.target)] for frame in shown])
    low, high = np.percentile(truth, (2, 98)) if truth.size else (0.0, 1.0)
    for row, frame in zip(axes, shown, strict=True):
        error = np.abs(frame.aligned - frame.target) / frame.target
        row[0].imshow(frame.picture, extent=(0, width, height, 0))  # the proportions of the truth
        for column, depth in ((1, frame.target), (2, frame.aligned)):
            depth_image = row[column].imshow(depth, vmin=low, vmax=high, cmap="turbo", interpolation="nearest")
        error_image = row[3].imshow(error, vmin=0, vmax=_LARGEST_ERROR, cmap="magma", interpolation="nearest")
        row[0].set_ylabel(f"frame {frame.index}")
        for each in row:
            each.set_xticks([])
            each.set_yticks([])
            each.set_facecolor("lightgrey")  # where there is no truth
    for axis, title in zip(axes[0], ("frame", "truth", "aligned prediction", "|p - g| / g"), strict=True):
        axis.set_title(title)
    figure.colorbar(depth_image, ax=axes[:, 1:3], shrink=0.8, label="depth")
    figure.colorbar(error_image, ax=axes[:, 3], shrink=0.8, extend="max")
    figure.suptitle(f"{result.name}: AbsRel {metrics.abs_rel:.4f}, δ < 1.25 {100 * metrics.delta_1:.1f} %")
    save_figure(figure, path)


def plot_trajectory(result: PoseResult, path: Path) -> None:
    """Writes a PNG: the aligned camera centres and the truth from above and over time, and their distance.

    Positions are in the axes of the first true camera (x right, y down, z forward), in the data set's units.

    Args:
        result: of `evaluate_camera_pose`, without a problem.
        path: written aside, then renamed; its folder exists.
    """
    origin, rotation = result.reference[0, :3, 3], result.reference[0, :3, :3]
    truth, estimate = ((centres - origin) @ rotation for centres in (result.reference[:, :3, 3], result.aligned))
    times, figure = result.timestamps - result.timestamps[0], new_figure((12, 6))
    axes = figure.subplot_mosaic([["top", "x"], ["top", "y"], ["top", "z"], ["top", "distance"]])
    for centres, colour, label in ((truth, _TRUTH, "truth"), (estimate, _ESTIMATE, "estimate, aligned")):
        axes["top"].plot(centres[:, 0], centres[:, 2], color=colour, label=label, marker=".", markersize=3)
        axes["top"].plot(*centres[0, [0, 2]], color=colour, marker="o")
        for column, name in enumerate("xyz"):
            axes[name].plot(times, centres[:, column], color=colour)
    axes["distance"].plot(times, np.linalg.norm(estimate - truth, axis=1), color=_ESTIMATE)
    axes["top"].set(xlabel="x (right)", ylabel="z (forward)", title="from above; a dot marks the first frame")
    axes["top"].set_aspect("equal", adjustable="datalim")
    axes["top"].legend()
    for name in ("x", "y", "z", "distance"):
        axes[name].set_ylabel(name)
        axes[name].tick_params(labelbottom=name == "distance")
    axes["distance"].set_xlabel("seconds, or frames, since the first")
    metrics = result.metrics
    errors = f"RPE {metrics.rpe_translation:.4f}, {metrics.rpe_rotation:.3f}°"
    figure.suptitle(f"{result.name}: ATE {metrics.ate:.4f}, {errors}")
    save_figure(figure, path)
