"""Photographs and videos of TensorFlow Datasets, without TensorFlow: through `tfds.data_source`.

It reads what is on the disk already, DATA_DIR/NAME/VERSION/ in the formats ArrayRecord or Parquet; TFRecord cannot be
read at random, and is refused. Videos are sequences of pictures: TFDS's own feature Video needs TensorFlow even to be
looked at. Needs `pip install -e ".[tfds]"`.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.schema import Sample
from omnistream_jax.data.sources import clip_indices


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """Pictures, or videos as lists of pictures: a `sources.Source`. Made by `open_tfds`.

    Attributes:
      name: how messages call it.
      examples: the random-access data source, pictures not decoded.
      feature: which part of an example holds the picture or the video.
      max_frames: 1 for pictures, None for videos.
      labels: the classes' names; () without a feature `label` of classes.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    feature: str
    max_frames: int | None
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def describe(self, index: int) -> str:
        """The data set's name and split, and the example's number."""
        return f"{self.name}, example {index}"

    def label(self, index: int) -> int | None:
        """The example's class, an index into `labels`; None where there are none."""
        return int(self.examples[index]["label"]) if self.labels else None

    def sample(self, index: int, rng: np.random.Generator, frames: int = 1, stride: tuple[int, int] = (1, 1)) -> Sample:
        """A picture as a clip of one frame, or a random clip of a video; see `sources.VideoSource.sample`."""
        path = self.describe(index)
        value = self.examples[index][self.feature]
        if self.max_frames == 1:
            if frames != 1:
                raise DataError(f"{path}: a photograph has 1 frame, a clip of {frames} was asked for")
            return Sample(frames=_decode(value, path)[None], path=path)
        indices = clip_indices(rng, len(value), frames, stride, path)
        return Sample(frames=np.stack([_decode(value[place], path) for place in indices]), path=path)


def open_tfds(root: str | os.PathLike, split: str = "train", *, name: str, feature: str | None = None) -> TfdsSource:
    """A data set that TensorFlow Datasets prepared.

    Args:
      root: its data_dir.
      split: as the data set calls it; TFDS's slices ("train[:10%]") too.
      name: "NAME", "NAME/CONFIG" or "NAME/CONFIG:VERSION".
      feature: which part of an example holds pictures or videos; None: "image", or else "video".

    Raises:
      DataError: TFDS is not installed, the data set is not there or cannot be read at random, or it has no such
        feature; the message lists those that it has.
    """
    tfds = _import()
    where = f"tfds {name} in {os.fspath(root)}"
    try:
        builder = tfds.builder(name, data_dir=os.fspath(root))
        features = dict(builder.info.features.items())
    except Exception as error:  # TFDS raises what it likes
        raise DataError(f"{where}: cannot be opened ({_first_line(error)})") from error
    if split.partition("[")[0] not in builder.info.splits:
        raise DataError(f"{where}: has no split {split!r}, only {', '.join(builder.info.splits) or 'none'}")
    feature = feature or next((each for each in ("image", "video") if each in features), "image")
    is_image = isinstance(features.get(feature), tfds.features.Image)
    is_video = isinstance(getattr(features.get(feature), "feature", None), tfds.features.Image)
    if not (is_image or is_video):
        raise DataError(f"{where}: has no pictures or videos named {feature!r}, only {', '.join(features)}")
    try:
        examples = builder.as_data_source(split=split, decoders={feature: _Undecoded()})
    except Exception as error:
        raise DataError(f"{where}: expected ArrayRecord or Parquet files ({_first_line(error)})") from error
    label = features.get("label")
    labels = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    return TfdsSource(f"tfds {name} ({split})", examples, feature, 1 if is_image else None, labels)


class _Undecoded:
    """A decoder, as TFDS calls one, that leaves pictures as the bytes of their files: read_image limits their size.

    TFDS's own `SkipDecoding` cannot be used in sequences.
    """

    def setup(self, *, feature: Any) -> None:
        pass

    def decode_example_np(self, example: Any) -> Any:
        return example

    def decode_batch_example_np(self, examples: Any) -> Any:
        return examples


def _import() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"tfds: TensorFlow Datasets is missing ({error}): pip install -e '.[tfds]'") from error
    return tensorflow_datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decode(value: Any, path: str) -> np.ndarray:
    """uint8 [H, W, 3] of a picture that TFDS hands out as the bytes of its file."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bytes):
        raise DataError(f"{path}: expected the bytes of a picture, found {type(value).__name__}")
    return read_image(path, file=io.BytesIO(value))
