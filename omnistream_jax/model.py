"""The public face of a backbone: encode clips, step streams, save. `omnistream_jax.load` makes one."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.convert import layouts
from omnistream_jax.models.backbone import (
    Backbone,
    BackboneOutput,
    default_dtype,
    select_layers,
    streaming_params,
)
from omnistream_jax.models.presets import BackboneConfig
from omnistream_jax.ops.attention import check_window
from omnistream_jax.ops.cache import CACHE_DTYPES
from omnistream_jax.stream import Stream, StreamOptions, advance, open_state

Frames = jax.Array | np.ndarray

_DTYPES = ("float32", "bfloat16", "float16")  # of the activations


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone with its weights.

    Attributes:
        config: sizes and mathematics.
        backbone: the Linen module; `backbone.apply({"params": params}, frames, masks=..., rope_scale=(t, yx))` is the
            lower-level entry for training.
        params: its parameters, float32.
        family: "omnistream" or "dinov3", the layout that `save` writes.
        source: the config.json that the weights came with; its keys are written back.
        storage_dtype: floating-point type of the tensors in files.
    """

    config: BackboneConfig
    backbone: Backbone
    params: Mapping[str, Any]
    family: str = "omnistream"
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    storage_dtype: str = "float32"

    def encode(
        self,
        frames: Frames,
        *,
        layers: Sequence[int] | None = None,
        camera_token: bool = False,
        aspect_ratio: Frames | Sequence[float] | None = None,
        time_unit: float | None = None,
        check: bool = False,
    ) -> BackboneOutput:
        """Features of whole clips.

        Args:
            frames: [B, T, H, W, 3] RGB, uint8 (normalised here by ImageNet's mean and deviation) or floats that are
                normalised already. H and W are multiples of the patch size.
            layers: blocks whose outputs `hidden` holds, in that order; None for all, () for none.
            camera_token: add the camera token to each frame.
            aspect_ratio: height / width [B] for the camera token's embedding; None adds none.
            time_unit: frames per unit of time; None takes the model's own, 16 unless its config.json says otherwise.
            check: refuse frames with NaN or infinities (waits for the device).

        Raises:
            ValueError: naming the argument that does not fit.
        """
        self._check_frames(frames, check)
        aspect_ratio = self._check_camera(camera_token, aspect_ratio, frames.shape[0])
        layers = select_layers(layers, self.config.depth)
        time_unit = np.float32(self._time_unit(time_unit))
        return _encode(self.backbone, layers, camera_token, self.params, frames, aspect_ratio, time_unit)

    def open_stream(
        self,
        batch: int = 1,
        height: int = 224,
        width: int = 224,
        *,
        window: int | None = None,
        sinks: int = 1,
        layers: Sequence[int] | None = None,
        camera_token: bool = False,
        aspect_ratio: Frames | Sequence[float] | None = None,
        time_unit: float | None = None,
        cache_dtype: str | None = None,
    ) -> Stream:
        """A batch of streams before their first frames, each with its own clock.

        Args:
            batch: number of streams.
            height, width: of the frames in pixels.
            window: frames that a query sees, its own and the sinks included; None sees the whole stream.
            sinks: first frames of a stream that stay visible for ever.
            layers, camera_token, aspect_ratio, time_unit: as in `encode`.
            cache_dtype: of the cached keys and values: "float32", "bfloat16", "float16" or "int8"; None takes the
                activations' own. "int8" has a quarter of float32's memory and errs by a few percent.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            if not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
        self._check_size(height, width)
        check_window(window, sinks)
        if batch < 1:
            raise ValueError(f"batch: expected at least one stream, got {batch}")
        aspect_ratio = self._check_camera(camera_token, aspect_ratio, batch)
        options = StreamOptions(
            batch=batch,
            height=height,
            width=width,
            window=window,
            sinks=sinks,
            layers=select_layers(layers, self.config.depth),
            camera_token=camera_token,
            time_unit=self._time_unit(time_unit),
            cache_dtype=self._cache_dtype(cache_dtype),
        )
        return Stream(options, open_state(self.backbone, options, aspect_ratio), np.zeros(batch, np.int64))

    def step(
        self, stream: Stream, frames: Frames, *, active: np.ndarray | None = None, check: bool = False
    ) -> tuple[BackboneOutput, Stream]:
        """Feed the next frames to a stream; the stream passed in is consumed (its cache is donated).

        Args:
            stream: of `open_stream` or of the last step.
            frames: [B, n, H, W, 3] as in `encode`, any n >= 1.
            active: bool [B], the streams that take these frames; the others pause: their frames are ignored and their
                features mean nothing. None: all. A mask compiles a program of its own, whatever is in it.
            check: refuse frames with NaN or infinities (waits for the device).

        Returns:
            Features [B, n, ...] equal to those of `encode` on the whole stream, and the stream after the frames.
        """
        stream.check_alive()
        self._check_frames(frames, check)
        options = stream.options
        expected = (options.batch, options.height, options.width)
        if (frames.shape[0], *frames.shape[2:4]) != expected:
            raise ValueError(
                f"frames: the stream was opened for [{expected[0]}, n, {expected[1]}, {expected[2]}, 3], "
                f"got {list(frames.shape)}"
            )
        if active is not None:
            active = np.asarray(active)
            if active.shape != (options.batch,) or active.dtype != bool:
                raise ValueError(f"active: expected a bool mask of shape ({options.batch},), got {active!r}")
        backbone, params = self._streaming
        return advance(backbone, params, stream, frames, active)

    @functools.cached_property
    def _streaming(self) -> tuple[Backbone, dict]:
        """The backbone and its parameters as steps take them."""
        return self.backbone.clone(streaming=True), streaming_params(self.params, self.backbone.dtype)

    def save(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors in the layout of the weights' family; `load` reads them back."""
        layouts.save(
            directory,
            self.params,
            self.config,
            family=self.family,
            source=self.source,
            storage_dtype=self.storage_dtype,
        )

    def _cache_dtype(self, cache_dtype: Any) -> str:
        dtype = jnp.dtype(self.backbone.dtype).name if cache_dtype is None else cache_dtype
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype: expected one of {', '.join(CACHE_DTYPES)}, got {cache_dtype!r}")
        return dtype

    def _time_unit(self, time_unit: float | None) -> float:
        try:
            unit = float(self.config.time_unit if time_unit is None else time_unit)
        except (TypeError, ValueError):
            unit = math.nan
        if not 0 < unit < math.inf:
            raise ValueError(f"time_unit: expected a positive number of frames, got {time_unit!r}")
        return unit

    def _check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(f"frames: height and width must be multiples of {patch}, got {height} x {width}")

    def _check_frames(self, frames: Frames, check: bool) -> None:
        shape = getattr(frames, "shape", None)
        if shape is None or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"frames: expected an array [B, T, H, W, 3] in RGB, got {shape or type(frames).__name__}")
        if frames.dtype != np.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
            raise ValueError(f"frames: expected uint8 or normalised floats, got {frames.dtype}")
        self._check_size(*shape[2:4])
        if check and frames.dtype != np.uint8:
            _check_finite(frames)

    def _check_camera(
        self, camera_token: bool, aspect_ratio: Frames | Sequence[float] | None, batch: int
    ) -> np.ndarray | None:
        if camera_token and not self.config.camera:
            raise ValueError("camera_token: these weights have no camera token")
        if aspect_ratio is None:
            return None
        if not camera_token:
            raise ValueError("aspect_ratio: only the camera token uses it; give camera_token=True")
        try:
            ratio = np.asarray(aspect_ratio, np.float32)
        except (TypeError, ValueError):
            ratio = np.array(np.nan)
        if ratio.shape != (batch,) or not np.all(np.isfinite(ratio) & (ratio > 0)):
            raise ValueError(f"aspect_ratio: expected {batch} positive values of height / width, got {aspect_ratio}")
        return ratio


def build_model(config: BackboneConfig, params: Mapping[str, Any], *, dtype: Any = None, **fields: Any) -> Model:
    """A Model from parts; `dtype` of the activations, None for `default_dtype()`."""
    return Model(config, Backbone(config, dtype=_floating_dtype(dtype)), params, **fields)


def load(path: str | os.PathLike, rope: str | None = None, dtype: Any = None) -> Model:
    """Load weights of OmniStream or DINOv3.

    Args:
        path: a directory with config.json and model.safetensors (one file, or shards with an index) in the released
            Hugging Face layout or as `Model.save` wrote it; or the id of such a repository on the hub, when online.
        rope: "released", "dinov3" or "dinov3_2d"; None takes what config.json says, else the family's own.
        dtype: of the activations; None is float32 on a CPU and bfloat16 on accelerators.

    Raises:
        convert.files.WeightsError: naming the file and everything in it that does not fit.
    """
    weights = layouts.read(path, rope=rope)
    return build_model(
        weights.config,
        jax.tree.map(jnp.asarray, weights.params),
        dtype=dtype,
        family=weights.family,
        source=weights.source,
        storage_dtype=weights.storage_dtype,
    )


def dtype_of(compute_dtype: str) -> str | None:
    """The `dtype` of `load` that a config's `compute_dtype` names, None of "auto". Raises ValueError for another."""
    if compute_dtype not in ("auto", *_DTYPES):
        raise ValueError(f"compute_dtype: expected one of auto, {', '.join(_DTYPES)}, got {compute_dtype!r}")
    return None if compute_dtype == "auto" else compute_dtype


def _floating_dtype(dtype: Any) -> Any:
    try:
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
    except TypeError:
        raise ValueError(f"dtype: expected {', '.join(_DTYPES)}, got {dtype!r}") from None
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype: expected {', '.join(_DTYPES)}, got {dtype.name}")
    return dtype


def _check_finite(frames: Frames) -> None:
    finite = np.isfinite(np.asarray(frames, np.float32)).all(axis=(2, 3, 4))
    if not finite.all():
        clip, frame = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"frames: {int((~finite).sum())} not finite, the first is frame {frame} of clip {clip}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
    backbone: Backbone,
    layers: tuple[int, ...],
    camera_token: bool,
    params: Mapping[str, Any],
    frames: jax.Array,
    aspect_ratio: jax.Array | None,
    time_unit: jax.Array,
) -> BackboneOutput:
    return backbone.apply(
        {"params": params},
        frames,
        layers=layers,
        camera_token=camera_token,
        aspect_ratio=aspect_ratio,
        time_unit=time_unit,
    )
