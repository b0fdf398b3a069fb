"""Images and captions written as ArrayRecord shards; `shard_output.py` says which files there are.

A record (data/picture_records.py) is one picture, for captions with its instruction, answer and boxes, and what else is
told about it, as the reader of the published layout gives them: no reader draws them at random. Pictures keep the bytes
of their published file, of whatever format, unless they are larger than was asked for and so encoded again; the
embedded world's, which have no file, are stored as PNG. Each is decoded, and its text checked as training does: what
fails is left out and counted. No byte depends on timing, workers, the place of the source, or earlier runs that were
killed.

What is in the shards is told record by record and not in the index: there may be millions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.data.command import UsageError
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.picture_files import check_reader, picture_file
from omnistream_jax.data.picture_records import CaptionRecord, ImageRecord, encode_caption, encode_image
from omnistream_jax.data.readers.captions import Prompt, implied_texts
from omnistream_jax.data.record_shards import Encode, Encoded, WriteRecords, label_of
from omnistream_jax.data.records import ImageOptions, image_file, scaled_image
from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.data.shard_index import CAPTIONS, IMAGES
from omnistream_jax.data.shard_output import SourceSettings, keep_names, opened_output, write_index, write_missing
from omnistream_jax.data.source_check import NamedSource, read_caption

_KEPT, _EXACT = ImageOptions(short_side=0), ImageOptions("png", short_side=0)


@dataclasses.dataclass(frozen=True)
class PictureSettings(SourceSettings):
    """What the shards depend on, beside the source.

    Attributes:
      shard_records: pictures of a shard.
      image: how those are stored that are larger than its `short_side`; 0 keeps the bytes of all.
    """

    shard_records: int = 4096
    image: ImageOptions = _KEPT

    def check(self) -> None:
        """Raises UsageError for values that make no sense."""
        if self.shard_records < 1:
            raise UsageError(f"shard_records: expected at least 1, got {self.shard_records}")
        self.image.check()


def write_image_shards(
    source: NamedSource, output: Path, settings: PictureSettings, workers: int = 1
) -> dict[str, Any]:
    """Writes the shards of images that are not there yet, and the index.

    Args:
      source: the data set in its published layout.
      output: made where it is missing.
      settings: see `PictureSettings`.
      workers: processes, with a shard each.

    Returns:
      The index.

    Raises:
      UsageError: the output holds something else, or shards of other settings or of another source.
      DataError: no picture could be read, or a worker died; the same call goes on from there.
      WorkdirLockedError: another run works in the output.
    """
    return _write(IMAGES, source, output, settings, _EncodeImage(source, settings.image), workers)


def write_caption_shards(
    source: NamedSource, output: Path, settings: PictureSettings, workers: int = 1
) -> dict[str, Any]:
    """Writes the shards of captioned images that are not there yet, and the index; see `write_image_shards`."""
    return _write(CAPTIONS, source, output, settings, _EncodeCaption(source, settings.image), workers)


def _write(
    kind: str, source: NamedSource, output: Path, settings: PictureSettings, encode: Encode, workers: int
) -> dict[str, Any]:
    settings.check()
    check_reader(source.reader)
    output, labels = Path(output), list(getattr(source.reader, "labels", ()))
    with opened_output(output, dataclasses.asdict(settings)):
        keep_names(output, _names(source), labels, kind)
        write = WriteRecords(source, encode, settings.shard_records)
        parts = write.parts()
        write_missing(output, write, [len(part) for part in parts], workers)

        def told(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
            return {"records": sum(content["records"] for content in contents), "labels": labels}

        return write_index(output, kind, source, settings, len(parts), "picture", told)


def _names(source: NamedSource) -> Iterator[str]:
    return (source.relative(source.reader.describe(index)) for index in range(len(source.reader)))


@dataclasses.dataclass(frozen=True)
class _EncodeImage:
    """An `Encode`."""

    source: NamedSource
    options: ImageOptions

    def __call__(self, index: int) -> Encoded:
        reader = self.source.reader
        sample = reader.sample(index, np.random.default_rng(0), 1, (1, 1))
        picture = _stored(sample.frames[0], picture_file(reader, index, sample.path), self.options, sample.path)
        name = self.source.relative(reader.describe(index))
        record = ImageRecord(source=reader.name, name=name, picture=picture, **label_of(self.source, index))
        return Encoded(encode_image(record))


@dataclasses.dataclass(frozen=True)
class _EncodeCaption:
    """An `Encode`."""

    source: NamedSource
    options: ImageOptions

    def __call__(self, index: int) -> Encoded:
        reader = self.source.reader
        sample = read_caption(reader, index)
        record = CaptionRecord(
            source=reader.name,
            name=self.source.relative(reader.describe(index)),
            instruction=sample.instruction,
            answer=sample.answer,
            boxes=sample.boxes,
            phrases=sample.phrases,
            others=_told_others(sample),
            path=self.source.relative(sample.path),
            picture=_stored(sample.image, picture_file(reader, index, sample.path), self.options, sample.path),
        )
        return Encoded(encode_caption(record))


def _told_others(sample: CaptionedImage) -> tuple[tuple[str, str], ...] | None:
    """What a record has to tell of `others`: None where its own text implies them."""
    implied = implied_texts(Prompt(sample.instruction, sample.answer, sample.boxes, sample.phrases))
    return None if sample.others == tuple(implied) else sample.others


def _stored(image: np.ndarray, published: bytes | None, options: ImageOptions, path: str) -> bytes:
    """The file that is stored of a picture uint8 [H, W, 3]."""
    if options.short_side and min(image.shape[:2]) > options.short_side:
        try:
            return image_file(scaled_image(image, options.short_side), options)
        except OSError as error:  # of an encoder: JPEG has at most 65,535 pixels a side
            height, width = image.shape[:2]
            message = f"{path}: its {height} x {width} pixels, scaled down, cannot be stored as {options.format}"
            raise DataError(f"{message} ({error})", reason="image cannot be stored") from error
    return image_file(image, _EXACT) if published is None else published
