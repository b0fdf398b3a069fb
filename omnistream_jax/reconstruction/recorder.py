"""Writes what a stream's geometry gives, frame by frame, in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from omnistream_jax.data.errors import require_field
from omnistream_jax.reconstruction.files import (
    IntrinsicsWriter,
    ReconstructionError,
    TrajectoryWriter,
    aside_name,
    intrinsics_line,
    tum_line,
    write_depth_png,
    write_depth_safetensors,
    write_ply,
)
from omnistream_jax.reconstruction.point_cloud import VoxelCloud, unproject

DEPTH, TRAJECTORY, INTRINSICS, POINTS = "depth", "trajectory.txt", "intrinsics.json", "points.ply"
_OURS = re.compile(r"(\d{6,}\.png|\d{6,}-\d{6,}\.safetensors)(\.tmp)?")  # in the folder DEPTH


@dataclasses.dataclass(frozen=True)
class PointOptions:
    """Which pixels become points, and how many points there may be.

    Attributes:
      voxel: the side of a voxel at first, metres (units where `metres_per_unit` is 1).
      max_points: at most so many points; when they would be more, the side doubles. 8 or more.
      min_confidence: pixels below it are left out; 0: none.
      confidence_quantile: in each frame, this share of the pixels with known depth is left out, those of least
        confidence; 0: none.
      every: frames from one whose pixels are taken to the next; 1 takes all.
      stride: pixels from one that is taken to the next, along rows and columns; 1 takes all.

    Raises:
      DataError: a field is out of range.
    """

    voxel: float = 0.02
    max_points: int = 1_000_000
    min_confidence: float = 0.0
    confidence_quantile: float = 0.0
    every: int = 1
    stride: int = 2

    def __post_init__(self):
        VoxelCloud(self.voxel, self.max_points)  # checks both
        require_field(self.min_confidence >= 0, "min_confidence", self.min_confidence, "0 or more")
        quantile = self.confidence_quantile
        require_field(0 <= quantile < 1, "confidence_quantile", quantile, "a share from 0 to below 1")
        require_field(self.every >= 1, "every", self.every, "1 frame or more")
        require_field(self.stride >= 1, "stride", self.stride, "1 pixel or more")

    @property
    def filters(self) -> bool:
        """Whether confidence is needed."""
        return self.min_confidence > 0 or self.confidence_quantile > 0


class ReconstructionRecorder:
    """Takes the frames of a stream, in order, and writes into a folder:

        depth/000000.png                   while it goes, 16 bits, millimetres: `files.write_depth_png`
        depth/000000-000063.safetensors    every `shard_frames` frames: "depth" and "confidence" float32 [T, H, W],
                                           "index" [T], "time" [T]
        trajectory.txt                     TUM's format; until `close`, trajectory.txt.tmp with all poses so far
        intrinsics.json                    [T, 3, 3], in the order of the trajectory; until `close`, aside likewise
        points.ply                         at `close`

    Use it with `with`: `close` is called however the block ends. A process that is killed leaves the pictures, the
    shards and the two growing files, and loses the last unfinished shard and the points. A recording that was in the
    folder before is removed, by the names above, when the first frame comes. Memory does not grow with the stream: a
    shard and `max_points` points are held.

    A model's depth has no metres unless it was trained for them: `metres_per_unit` multiplies depth and translations in
    everything that is written, the points included.

    Args:
      output: the folder; made with the first frame.
      depth_png, depth_tensors, trajectory, intrinsics, points: which of the above are written.
      metres_per_unit: metres in a unit of the model.
      shard_frames: frames in a safetensors file.
      point_options: see `PointOptions`; its lengths are in metres.

    Attributes:
      frames: added so far.
      cloud: the points so far, for viewers; None without `points`.

    Raises:
      DataError: an argument is out of range.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        *,
        depth_png: bool = True,
        depth_tensors: bool = True,
        trajectory: bool = True,
        intrinsics: bool = True,
        points: bool = True,
        metres_per_unit: float = 1.0,
        shard_frames: int = 64,
        point_options: PointOptions | None = None,
    ):
        require_field(0 < metres_per_unit < np.inf, "metres_per_unit", metres_per_unit, "a finite number above 0")
        require_field(shard_frames >= 1, "shard_frames", shard_frames, "1 frame or more")
        self.output, self._metres, self._shard_frames = Path(output), float(metres_per_unit), shard_frames
        self._depth_png, self._depth_tensors = depth_png, depth_tensors
        self._write_trajectory, self._write_intrinsics = trajectory, intrinsics
        self._options = point_options or PointOptions()
        self.cloud = VoxelCloud(self._options.voxel, self._options.max_points) if points else None
        self.frames, self._last, self._size, self._closed = 0, -1, None, False
        self._confident = False
        self._trajectory: TrajectoryWriter | None = None
        self._intrinsics: IntrinsicsWriter | None = None
        self._shard: _Shard | None = None

    def add(
        self,
        index: int,
        time: float,
        image: np.ndarray,
        depth: np.ndarray,
        confidence: np.ndarray | None,
        cam_to_world: np.ndarray,
        intrinsics: np.ndarray,
    ) -> None:
        """Takes a frame; all arrays are NumPy's, and may be changed afterwards.

        Args:
          index: the frame's number, 0 or more and above the last one's; it names the depth picture.
          time: seconds.
          image: uint8 [H, W, 3].
          depth: [H, W], z-depth in the model's units; not known where it is not finite or not above 0.
          confidence: [H, W], above 0; None: not known, then every pixel counts alike and nothing can be filtered by it.
          cam_to_world: [4, 4], translation in the model's units.
          intrinsics: [3, 3], in pixels of `depth`.

        Raises:
          ReconstructionError: the arrays do not fit, a pose or intrinsics are none, or a file cannot be written.
        """
        self._check(index, time, image, depth, confidence, cam_to_world, intrinsics)
        if self._size is None:
            self._begin(*depth.shape)
        self._confident = confidence is not None
        pose = cam_to_world.astype(np.float64)
        pose[:3, 3] *= self._metres
        if self._trajectory is not None:
            self._trajectory.add(time, pose)
        if self._intrinsics is not None:
            self._intrinsics.add(intrinsics)
        metres = depth.astype(np.float32) * self._metres
        if self._depth_png:
            write_depth_png(self.output / DEPTH / f"{index:06d}.png", metres)
        if self._depth_tensors:
            self._shard = self._shard or _Shard(self._shard_frames, metres.shape, confidence is not None)
            self._shard.add(index, time, metres, confidence)
            if self._shard.full:
                self._end_shard()
        if self.cloud is not None and self.frames % self._options.every == 0:
            self._add_points(image, metres, confidence, pose, intrinsics)
        self.frames, self._last = self.frames + 1, index

    def close(self) -> None:
        """Writes what is written last, and gives the growing files their names; a second call does nothing.

        Each file is tried, whatever became of the others. Without a frame, nothing is written.

        Raises:
          ReconstructionError: a file cannot be written.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:  # in the opposite order: the quick ones first
            if self.frames and self.cloud is not None:
                stack.callback(lambda: write_ply(self.output / POINTS, self.cloud.points, self.cloud.colours))
            if self.frames:
                stack.callback(self._end_shard)
            for growing in (self._intrinsics, self._trajectory):
                if growing is not None:
                    stack.callback(growing.close if self.frames else growing.discard)

    @property
    def files(self) -> list[str]:
        """What `close` leaves in the folder, by name; empty as long as there is no frame."""
        wanted = {
            DEPTH: self._depth_png or self._depth_tensors,
            TRAJECTORY: self._write_trajectory,
            INTRINSICS: self._write_intrinsics,
            POINTS: self.cloud is not None,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted and self.frames]

    def __enter__(self) -> ReconstructionRecorder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check(self, index, time, image, depth, confidence, cam_to_world, intrinsics) -> None:
        where = f"{self.output}, frame {index}"
        if self._closed:
            raise ReconstructionError(f"{where}: the recording is closed")
        if index <= self._last:
            raise ReconstructionError(f"{where}: expected a number above the last one's, {self._last}")
        size = self._size or depth.shape
        expected = {
            "depth": (depth, size if len(size) == 2 else ("H", "W")),
            "image": (image, (*size, 3)),
            "confidence": (confidence, size),
            "cam_to_world": (cam_to_world, (4, 4)),
            "intrinsics": (intrinsics, (3, 3)),
        }
        for name, (values, shape) in expected.items():
            if values is not None and values.shape != shape:
                raise ReconstructionError(f"{where}: {name} {values.shape}, expected {shape}")
        if self.frames and (confidence is not None) != self._confident:
            raise ReconstructionError(f"{where}: confidence is given for some frames only, expected all or none")
        if image.dtype != np.uint8:
            raise ReconstructionError(f"{where}: image {image.dtype}, expected uint8")
        tum_line(where, time, cam_to_world)  # these two raise
        intrinsics_line(where, intrinsics)
        if not min(intrinsics[0, 0], intrinsics[1, 1]) > 0:
            raise ReconstructionError(f"{where}: intrinsics {intrinsics.tolist()}, expected positive focal lengths")
        if self.cloud is not None and self._options.filters and confidence is None:
            fields = "min_confidence, confidence_quantile"
            raise ReconstructionError(f"{where}: {fields}: the frame has no confidence to choose points by")

    def _begin(self, height: int, width: int) -> None:
        """Makes the folder, clears it of an earlier recording, and opens the growing files."""
        self._size = height, width
        folder = self.output / DEPTH
        try:
            (folder if self._depth_png or self._depth_tensors else self.output).mkdir(parents=True, exist_ok=True)
            old = [path for path in folder.glob("*") if _OURS.fullmatch(path.name)]
            for name in (TRAJECTORY, INTRINSICS, POINTS):
                old += [self.output / name, aside_name(self.output / name)]
            for path in old:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ReconstructionError(f"{self.output}: cannot be written ({error})") from error
        if self._write_trajectory:
            self._trajectory = TrajectoryWriter(self.output / TRAJECTORY)
        if self._write_intrinsics:
            self._intrinsics = IntrinsicsWriter(self.output / INTRINSICS, height, width)

    def _end_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard.write(self.output / DEPTH, {"metres_per_unit": repr(self._metres)})

    def _add_points(
        self,
        image: np.ndarray,
        metres: np.ndarray,
        confidence: np.ndarray | None,
        pose: np.ndarray,
        intrinsics: np.ndarray,
    ) -> None:
        """`metres` and `pose` are in metres."""
        options, step = self._options, slice(None, None, self._options.stride)
        depth, colours = metres[step, step], image[step, step]
        chosen = np.isfinite(depth) & (depth > 0)
        if confidence is not None:
            confidence = confidence[step, step].astype(np.float64)
            chosen &= np.isfinite(confidence) & (confidence > 0)
            floor = options.min_confidence
            if options.confidence_quantile and chosen.any():
                floor = max(floor, np.quantile(confidence[chosen], options.confidence_quantile))
            chosen &= confidence >= floor
            confidence = confidence[chosen]
        points = unproject(metres, intrinsics, pose, options.stride)
        self.cloud.add(points[chosen], colours[chosen], confidence)


class _Shard:
    """Frames of a safetensors file until it is full; see `files.write_depth_safetensors`."""

    def __init__(self, frames: int, size: tuple[int, int], with_confidence: bool):
        self._count, self._index, self._time = 0, np.empty(frames, np.int64), np.empty(frames)
        self._depth = np.empty((frames, *size), np.float32)
        self._confidence = np.empty_like(self._depth) if with_confidence else None

    def add(self, index: int, time: float, depth: np.ndarray, confidence: np.ndarray | None) -> None:
        place, self._count = self._count, self._count + 1
        self._index[place], self._time[place], self._depth[place] = index, time, depth
        if self._confidence is not None:
            self._confidence[place] = confidence

    @property
    def full(self) -> bool:
        return self._count == len(self._index)

    def write(self, folder: Path, metadata: dict[str, str]) -> None:
        some = slice(self._count)
        index = self._index[some]
        write_depth_safetensors(
            folder / f"{index[0]:06d}-{index[-1]:06d}.safetensors",
            self._depth[some],
            index=index,
            time=self._time[some],
            confidence=None if self._confidence is None else self._confidence[some],
            metadata=metadata,
        )
