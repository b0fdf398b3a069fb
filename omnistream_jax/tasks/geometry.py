"""Streaming geometric reconstruction, L_geo = L_depth + L_ray + L_points + L_camera (OmniStream eq. 6-8).

Letters: B clips, T frames, H x W pixels, h x w patches.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct

from omnistream_jax.data.posed import PosedData
from omnistream_jax.geometry.cameras import encode_camera
from omnistream_jax.geometry.normalize import NormalizedClip, normalize_clip, scale_translations
from omnistream_jax.geometry.rays import points_from_rays, ray_map
from omnistream_jax.losses.depth import depth_means
from omnistream_jax.losses.geometry import camera_means, point_means, ray_means
from omnistream_jax.losses.means import Mean, add_means, mean_of
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.geometry import GeometryHeads, GeometryPrediction
from omnistream_jax.ops.rope import random_scale
from omnistream_jax.tasks.task import Params, Teachers

HEADS = "geometry"


@dataclasses.dataclass(frozen=True)
class GeometrySettings:
    """Constants of L_geo.

    Attributes:
        alpha: weight of -log(confidence).
        gradient_scales: scales of the depth's gradient term, 1 or VGGT's 4.
        point_norm: "l1", the paper's, or "l2", the length of a point's error (VGGT).
        ray_confidence: whether the rays' confidence is trained.
        depth_weight, ray_weight, point_weight, camera_weight: of the four terms.
        rope_jitter: as in `SelfSupervisionSettings`.
    """

    alpha: float = 0.2
    gradient_scales: int = 1
    point_norm: str = "l1"
    ray_confidence: bool = False
    depth_weight: float = 1.0
    ray_weight: float = 1.0
    point_weight: float = 1.0
    camera_weight: float = 1.0
    rope_jitter: float = 2.0


@dataclasses.dataclass(frozen=True)
class GeometryTask:
    """A `Task`; see `tasks/task.py`.

    Attributes:
        name, weight, data: as of every task.
        backbone: the student's module.
        geometry_heads: what is trained on top.
        settings: constants of the loss.
        remat: compute the heads' activations again in the backward pass.
        micro_batches: as of every task; its means over valid pixels, cells and frames stay those of the whole batch.
    """

    name: str
    weight: float
    data: PosedData
    backbone: Backbone
    geometry_heads: GeometryHeads
    settings: GeometrySettings
    remat: bool = False
    has_teacher: bool = False
    micro_batches: int = 1

    @property
    def heads(self) -> Mapping[str, Callable[[jax.Array], Params]]:
        """The dual DPT and the camera head, as one module."""
        return {HEADS: lambda key: init_heads(self.geometry_heads, key)}

    def loss(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted sum of the terms, and each term; see `Task.loss` and `data/schema.py:PosedBatch`."""
        metrics = {name: add_means(terms) for name, terms in self.means(params, teachers, batch, key).items()}
        return metrics.pop("loss"), metrics

    def means(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, list[Mean]]:
        """The loss and its metrics as means over the batch; see `Task.means`."""
        prediction = self._predict(params, batch["frames"], key)
        target = geometry_target(batch, prediction.rays.shape[2:4], self.geometry_heads.config.units)
        settings = self.settings
        depth = depth_means(
            prediction.depth,
            prediction.depth_confidence,
            target.depth,
            target.depth_valid,
            alpha=settings.alpha,
            gradient_scales=settings.gradient_scales,
        )
        rays = ray_means(
            prediction.rays,
            target.rays,
            _at_cells(target.place_valid, target.rays),
            _at_cells(target.pose_valid, target.rays),
            confidence=prediction.ray_confidence if settings.ray_confidence else None,
            alpha=settings.alpha,
        )
        points = point_means(
            points_from_rays(_resized(prediction.rays, *target.depth.shape[2:]), prediction.depth),
            target.points,
            target.depth_valid & target.pose_valid[..., None, None],
            norm=settings.point_norm,
        )
        everywhere = jnp.ones_like(target.pose_valid)
        camera = camera_means(prediction.camera, target.camera, target.place_valid, target.pose_valid, everywhere)
        error = jnp.abs(prediction.depth - target.depth) / jnp.where(target.depth_valid, target.depth, 1.0)
        terms = {"depth": depth, "rays": rays, "points": points, "camera": camera}
        weights = (settings.depth_weight, settings.ray_weight, settings.point_weight, settings.camera_weight)
        loss = [mean.times(weight) for weight, means in zip(weights, terms.values(), strict=True) for mean in means]
        return {"loss": loss, **terms, "depth_abs_rel": [mean_of(error, target.depth_valid)]}

    def _predict(self, params: Params, frames: jax.Array, key: jax.Array) -> GeometryPrediction:
        height, width = frames.shape[2:4]
        out = self.backbone.apply(
            {"params": params["backbone"]},
            frames,
            layers=self.geometry_heads.config.layers,
            camera_token=True,
            aspect_ratio=jnp.full(frames.shape[0], height / width, jnp.float32),
            rope_scale=random_scale(key, self.settings.rope_jitter),
        )

        def heads(params: Params, hidden: tuple[jax.Array, ...], camera: jax.Array) -> GeometryPrediction:
            return self.geometry_heads.apply({"params": params}, hidden, camera, height, width)

        heads = jax.checkpoint(heads) if self.remat else heads
        return heads(params[HEADS], out.hidden, out.camera)


@struct.dataclass
class GeometryTarget:
    """The truth of a batch in the first camera's coordinates; what is not known is masked.

    Attributes:
        depth: [B, T, H, W].
        depth_valid: bool [B, T, H, W].
        points: [B, T, H, W, 3].
        rays: [B, T, rows, columns, 6].
        camera: [B, T, 9].
        pose_valid: bool [B, T], the camera's rotation is known: of all frames with poses, else of the first.
        place_valid: bool [B, T], the camera's place is known in the units of the target.
    """

    depth: jax.Array
    depth_valid: jax.Array
    points: jax.Array
    rays: jax.Array
    camera: jax.Array
    pose_valid: jax.Array
    place_valid: jax.Array


def geometry_target(batch: Mapping[str, jax.Array], ray_cells: tuple[int, int], units: str) -> GeometryTarget:
    """Targets of a `PosedBatch`.

    Args:
        batch: its arrays.
        ray_cells: (rows, columns) of the ray map.
        units: "clip": lengths are divided by the clip's mean distance of points to the first camera, so that no scale
            need be known; "metres": they stay, and clips that are not metric teach no length.
    """
    height, width = batch["depth"].shape[2:]
    known = batch["valid"] & batch["has_depth"][:, None, None, None]
    clip = normalize_clip(batch["depth"], known, batch["cam_to_world"], batch["intrinsics"], has_pose=batch["has_pose"])
    measured = known.any(axis=(1, 2, 3))  # without depth there is no scale
    if units == "metres":
        clip, measured = _with_scale(clip), batch["metric"]
        known &= measured[:, None, None, None]
    first = jnp.arange(known.shape[1]) == 0
    pose_valid = batch["has_pose"][:, None] | first
    return GeometryTarget(
        depth=clip.depth,
        depth_valid=known,
        points=clip.points,
        rays=ray_map(clip.cam_to_world, batch["intrinsics"], height, width, *ray_cells),
        camera=encode_camera(clip.cam_to_world, batch["intrinsics"], height, width),
        pose_valid=pose_valid,
        place_valid=pose_valid & (measured[:, None] | first),
    )


def _with_scale(clip: NormalizedClip) -> NormalizedClip:
    """The clip in the units that its data set has."""
    return clip._replace(
        depth=clip.depth * clip.scale[:, None, None, None],
        points=clip.points * clip.scale[:, None, None, None, None],
        cam_to_world=scale_translations(clip.cam_to_world, 1 / clip.scale[:, None]),
        scale=jnp.ones_like(clip.scale),
    )


def init_heads(heads: GeometryHeads, key: jax.Array) -> Params:
    """Fresh parameters of the heads."""
    side = heads.patch_size
    hidden = [jnp.zeros((1, 1, 1, heads.width))] * len(heads.config.layers)
    return heads.init(key, hidden, jnp.zeros((1, 1, heads.width)), side, side)["params"]


def _at_cells(frames: jax.Array, rays: jax.Array) -> jax.Array:
    """A mask of frames [B, T] at every cell of ray maps."""
    return jnp.broadcast_to(frames[..., None, None], rays.shape[:-1])


def _resized(rays: jax.Array, height: int, width: int) -> jax.Array:
    """Ray maps [B, T, rows, columns, 6] at every pixel, bilinearly."""
    return jax.image.resize(rays, (*rays.shape[:2], height, width, rays.shape[-1]), "linear")
