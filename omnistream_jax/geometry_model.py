"""A backbone with its geometry heads: depth, rays and cameras of clips and of streams."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omnistream_jax import model as model_lib
from omnistream_jax.convert.files import WeightsError, check_shapes, find_directory, read_json, read_tensor_file
from omnistream_jax.geometry.cameras import decode_camera
from omnistream_jax.geometry.rays import camera_from_rays
from omnistream_jax.model import Frames, Model
from omnistream_jax.models.backbone import BackboneOutput
from omnistream_jax.models.geometry import GeometryConfig, GeometryHeads
from omnistream_jax.stream import Stream
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.tensor_file import write_tensors
from omnistream_jax.utils.trees import named_leaves, nest

CONFIG_NAME, WEIGHTS_NAME = "geometry.json", "geometry.safetensors"


@struct.dataclass
class Reconstruction:
    """Geometry of T frames, float32, in the coordinates of the stream's first camera (OpenCV's axes).

    Lengths are in the model's units, see `GeometryConfig.units`. Pixel centres lie at + 0.5.

    Attributes:
        depth: [B, T, H, W], along each camera's axis.
        depth_confidence: [B, T, H, W], 1 or more.
        rays: [B, T, 8h, 8w, 6], origin and direction (of unit depth) at the centres of 8 x 8 cells a patch.
        ray_confidence: [B, T, 8h, 8w], 1 or more.
        cam_to_world: [B, T, 4, 4], by the camera head.
        intrinsics: [B, T, 3, 3], in pixels, by the camera head; the principal point is the centre.
    """

    depth: jax.Array
    depth_confidence: jax.Array
    rays: jax.Array
    ray_confidence: jax.Array
    cam_to_world: jax.Array
    intrinsics: jax.Array

    def cameras_from_rays(self) -> tuple[jax.Array, jax.Array]:
        """cam_to_world and intrinsics solved from the ray maps instead; any principal point."""
        return _solve_cameras(self.rays, self.ray_confidence, *self.depth.shape[2:])


@dataclasses.dataclass(frozen=True)
class GeometryModel:
    """A backbone with geometry heads and their weights.

    Attributes:
        model: the backbone.
        heads: the Linen module; its `config` says which blocks it reads and what a unit of length is.
        params: the heads' parameters, float32.
    """

    model: Model
    heads: GeometryHeads
    params: Mapping[str, Any]

    def reconstruct(self, frames: Frames, *, time_unit: float | None = None) -> Reconstruction:
        """Depth and cameras of whole clips.

        Args:
            frames: [B, T, H, W, 3] RGB as for `Model.encode`.
            time_unit: as for `Model.encode`.
        """
        shape = np.shape(frames)
        # Other shapes are refused by `encode`, in its words.
        batch, height, width = (shape[0], *shape[2:4]) if len(shape) == 5 else (1, 1, 1)
        out = self.model.encode(frames, time_unit=time_unit, **self._reads(batch, height, width))
        return self._geometry(out, height, width)

    def open_stream(self, batch: int = 1, height: int = 224, width: int = 224, **options: Any) -> Stream:
        """As `Model.open_stream`, which names the options; `layers`, `camera_token` and `aspect_ratio` are set here."""
        return self.model.open_stream(batch, height, width, **self._reads(batch, height, width), **options)

    def step(
        self, stream: Stream, frames: Frames, *, active: np.ndarray | None = None
    ) -> tuple[Reconstruction, BackboneOutput, Stream]:
        """Feed the next frames to a stream, see `Model.step`: their geometry, their features, the stream after them.

        Without a window the geometry equals that of `reconstruct` on the whole stream.
        """
        options = stream.options
        if options.layers != self.heads.config.layers or not options.camera_token:
            raise ValueError("stream: it does not give what the geometry heads read; open it with this model")
        out, stream = self.model.step(stream, frames, active=active)
        return self._geometry(out, options.height, options.width), out, stream

    def save(self, directory: str | os.PathLike) -> None:
        """Write the backbone as `Model.save` does, and beside it geometry.json and geometry.safetensors."""
        self.model.save(directory)
        directory, leaves = Path(directory), named_leaves(dict(self.params))
        with written_aside(directory / CONFIG_NAME) as text, written_aside(directory / WEIGHTS_NAME) as weights:
            write_tensors(weights, {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()})
            text.write_text(json.dumps(dataclasses.asdict(self.heads.config), indent=2) + "\n", encoding="utf-8")

    def _reads(self, batch: int, height: int, width: int) -> dict[str, Any]:
        """What the heads need of the backbone, as arguments of `encode` and `open_stream`, which check the sizes."""
        ratio = np.full(batch, height / width if width else np.nan, np.float32)
        return {"layers": self.heads.config.layers, "camera_token": True, "aspect_ratio": ratio}

    def _geometry(self, out: BackboneOutput, height: int, width: int) -> Reconstruction:
        return _apply_heads(self.heads, self.params, out.hidden, out.camera, height, width)


def build_geometry_model(model: Model, config: GeometryConfig, params: Mapping[str, Any]) -> GeometryModel:
    """A GeometryModel from parts; the heads compute in the backbone's dtype."""
    sizes = model.config
    return GeometryModel(model, GeometryHeads(config, sizes.width, sizes.patch_size, model.backbone.dtype), params)


def load_geometry(path: str | os.PathLike, rope: str | None = None, dtype: Any = None) -> GeometryModel:
    """Load a backbone with geometry heads, as training left them in WORKDIR/model or `GeometryModel.save` wrote them.

    Args:
        path: a directory or hub id; rope, dtype: as of `load`.

    Raises:
        convert.files.WeightsError: naming the file and everything in it that does not fit.
    """
    model = model_lib.load(path, rope=rope, dtype=dtype)
    directory = find_directory(path)
    if not (directory / CONFIG_NAME).exists():
        raise WeightsError(
            f"{directory}: a backbone without geometry heads, expected {CONFIG_NAME} in it. The released weights have "
            "none; training with tasks.clip_geometry makes them (WORKDIR/model)"
        )
    if not model.config.camera:
        raise WeightsError(f"{directory}: geometry heads need a backbone with a camera token, this one has none")
    config = _read_config(directory / CONFIG_NAME, model.config.depth)
    built = build_geometry_model(model, config, {})
    tensors = read_tensor_file(directory / WEIGHTS_NAME)
    check_shapes(directory / WEIGHTS_NAME, tensors, _shapes(built.heads))
    params = jax.tree.map(jnp.asarray, nest({name: tensor.astype(np.float32) for name, tensor in tensors.items()}))
    return dataclasses.replace(built, params=params)


def _read_config(path: Path, depth: int) -> GeometryConfig:
    content = read_json(path)
    fields = {field.name for field in dataclasses.fields(GeometryConfig)}
    if set(content) != fields:
        raise WeightsError(f"{path}: expected the keys {sorted(fields)}, got {sorted(content)}")
    for name, value in content.items():
        numbers = value if name in ("layers", "out_channels") else [] if name == "units" else [value]
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise WeightsError(f"{path}: {name}: expected whole numbers, got {value!r}")
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        config = GeometryConfig(**values)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if max(config.layers) >= depth:
        raise WeightsError(f"{path}: layers: the backbone has {depth} blocks, got {config.layers}")
    return config


def _shapes(heads: GeometryHeads) -> dict[str, tuple[int, ...]]:
    """Of the parameters, by name."""
    side, width = heads.patch_size, heads.width
    token = jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32)
    camera = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    init = functools.partial(heads.init, height=side, width=side)
    params = jax.eval_shape(init, jax.random.key(0), [token] * len(heads.config.layers), camera)["params"]
    return {name: leaf.shape for name, leaf in named_leaves(params).items()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _solve_cameras(rays: jax.Array, confidence: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    return camera_from_rays(rays, height, width, confidence)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _apply_heads(
    heads: GeometryHeads,
    params: Mapping[str, Any],
    hidden: tuple[jax.Array, ...],
    camera: jax.Array,
    height: int,
    width: int,
) -> Reconstruction:
    prediction = heads.apply({"params": params}, hidden, camera, height, width)
    cam_to_world, intrinsics = decode_camera(prediction.camera, height, width)
    return Reconstruction(
        depth=prediction.depth,
        depth_confidence=prediction.depth_confidence,
        rays=prediction.rays,
        ray_confidence=prediction.ray_confidence,
        cam_to_world=cam_to_world,
        intrinsics=intrinsics,
    )
