"""The data of language: captioned images -> square pictures and their texts as tokens -> batches of fixed length.

The picture keeps its proportions: it is resized to fit a square and laid into its top left corner. Nothing else is
done to it: a crop could cut away what the text speaks of, a mirror would swap its left and right, other colours would
belie it. Boxes in the text (data/boxes.py), in thousandths of the image, become thousandths of the square: what the
decoder says about places refers to what the backbone sees.

A row holds the captions of `captions_per_row` records that follow each other in the shuffled order, whatever their
lengths: so batches are determined by the step alone, and every record comes once in a pass. Of what else a record
tells about its image, some may come with it: the image is encoded once for all of its texts, and none of them sees
another (multi-annotated images; Deitke et al. 2024, "Molmo and PixMo").
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from omnistream_jax.data.boxes import malformed_boxes, move_boxes
from omnistream_jax.data.chat import EMBEDDED, Turn, control_tokens, load_chat
from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.readers.captions import CaptionSource
from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.utils.segments import SHARED

PADDING = (124, 116, 104)  # ImageNet's mean colour: near 0 once the model has normalised it


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionData(MixtureData[CaptionSource]):
    """Batches of captioned images; see `schema.CaptionBatch`. Their order is random, and which others come with a text.

    A sample of `global_batch_size` is a row: a step draws `captions_per_row` times as many records.

    Attributes:
      tokenizer: "embedded", or a directory, hub id or JSON file of one with Qwen3's chat tokens (`chat.load_chat`).
      max_tokens: L, tokens of a row. Where its captions are longer, the longest answers are cut (`chat.shares`), and
        still end with the token that ends them. A record is skipped if L // (K texts_per_image) tokens would hold
        nothing of its answer.
      captions_per_row: K, records of a row.
      texts_per_image: the most texts about an image: its record's own, and others of it, drawn anew in every pass
        (`CaptionedImage.others`); a record that has fewer gives all of them. Others that do not fit, or whose text
        cannot be used, stay out: `CaptionBatch` says how many texts each image has.
      size: S, side of the square in pixels.
    """

    tokenizer: str = EMBEDDED
    max_tokens: int = 256
    captions_per_row: int = 1
    texts_per_image: int = 1
    size: int = 224

    def __post_init__(self):
        super().__post_init__()
        require_field(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        fits = 1 <= self.captions_per_row <= self.max_tokens
        require_field(fits, "captions_per_row", self.captions_per_row, f"1 to max_tokens ({self.max_tokens})")
        most = min(SHARED - 1, self.max_tokens // self.captions_per_row)
        expected = f"1 to {most} (less than {SHARED}, and at most max_tokens / captions_per_row)"
        require_field(1 <= self.texts_per_image <= most, "texts_per_image", self.texts_per_image, expected)
        require_field(self.size >= 1, "size", self.size, "1 or more")
        load_chat(self.tokenizer)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token that can come up."""
        return load_chat(self.tokenizer).vocabulary_size

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        with because("image or caption cannot be read"):
            sample = source.read(index)
        with because("text cannot be used"):
            image, shown = letterbox(sample.image, self.size)
            turns = self._turns(sample, shown, rng)
        return {"image": image, "turns": turns}

    def _turns(self, sample: CaptionedImage, shown: tuple[float, float], rng: np.random.Generator) -> list[Turn]:
        """A record's own text and others about its image as tokens; others that cannot be used or fit stay out."""
        chat, assured = load_chat(self.tokenizer), self.max_tokens // (self.captions_per_row * self.texts_per_image)

        def turn(instruction: str, answer: str) -> Turn:
            _check_text(instruction, answer, sample.path)
            return chat.turn(move_boxes(instruction, shown), move_boxes(answer, shown), sample.path)

        own = turn(sample.instruction, sample.answer)
        if not chat.shorten(own, assured).answer:
            raise DataError(
                f"{sample.path}: {assured} tokens leave no room for an answer after {len(own.prompt)} before it",
                reason="no room for an answer",
            )
        turns = [own]
        for place in rng.permutation(len(sample.others)) if self.texts_per_image > 1 else ():
            if len(turns) == self.texts_per_image:
                break
            with contextlib.suppress(DataError):  # no reason to refuse the record; the batch's `texts` tells it
                other = turn(*sample.others[place])
                turns += [other] if chat.shorten(other, assured).answer else []
        return turns

    def _join(self, samples: grain.MapDataset) -> grain.MapDataset:
        return samples.batch(self.captions_per_row, batch_fn=self._row)

    def _row(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        packed = load_chat(self.tokenizer).pack([sample["turns"] for sample in samples], self.max_tokens)
        skipped = {key: np.array([sample["skipped"][key] for sample in samples]) for key in samples[0]["skipped"]}
        stacked = {key: np.stack([sample[key] for sample in samples]) for key in ("image", "record")}
        return {**stacked, **packed, "skipped": skipped}


def check_text(sample: CaptionedImage) -> None:
    """Raises DataError where a record's own text cannot be learned; what else it tells is left out if it is bad.

    An answer with no text cannot, nor can control tokens, which would fake a turn, or a box that is not written as one.
    """
    _check_text(sample.instruction, sample.answer, sample.path)


def _check_text(instruction: str, answer: str, path: str) -> None:
    if not answer.strip():
        raise DataError(f"{path}: its caption has no text", reason="caption has no text")
    if found := control_tokens(instruction + " " + answer):
        raise DataError(f"{path}: its text holds {', '.join(found)}", reason="text holds control tokens")
    if malformed_boxes(instruction) or malformed_boxes(answer):
        raise DataError(f"{path}: its text holds a box that is not written as one", reason="box is none")


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Resizes an image to fit the top left corner of a square (bicubic, antialiased); the rest is grey.

    Args:
      image: uint8 [H, W, 3].
      size: side of the square.

    Returns:
      uint8 [size, size, 3], and the shares of its width and of its height that the image takes.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    shown_width, shown_height = max(1, round(width * scale)), max(1, round(height * scale))
    square = np.full((size, size, 3), PADDING, np.uint8)
    resized = Image.fromarray(image).resize((shown_width, shown_height), Image.Resampling.BICUBIC)
    square[:shown_height, :shown_width] = np.asarray(resized)
    return square, (shown_width / size, shown_height / size)
