"""What the readers of captioned images share: how instructions and answers are worded, and the checks on every row.

Boxes in text are written as data/boxes.py has it, with corners in thousandths of the image.

A malformed row raises DataError that names it when it is read, not when the data set is opened, so that a run can skip
and count it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from omnistream_jax.data.boxes import REF_END, REF_START, format_box, format_phrase, without_boxes
from omnistream_jax.data.chat import CONTROL
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.schema import CaptionedImage

DESCRIBE = "Describe the image."
DESCRIBE_WITH_BOXES = "Describe the image and give the boxes of what you name."
LOCATE = f"Give the box of {REF_START}{{phrase}}{REF_END}."
TRANSCRIBE = "Transcribe the text in the image."
TRANSCRIBE_WITH_BOXES = "Transcribe the text in the image and give the box of each piece."

OUTSIDE = 0.02
"""Boxes may reach this share of the image beyond its border, as detectors let them, and are cut there."""


class CaptionSource(Protocol):
    """Captioned images, by index."""

    name: str

    def __len__(self) -> int:
        """How many there are."""

    def describe(self, index: int) -> str:
        """What a person would look for: the path of a record."""

    def read(self, index: int) -> CaptionedImage:
        """Reads one. Raises DataError, naming the file, where it cannot be used."""


class Prompt(NamedTuple):
    """A CaptionedImage without its image; the fields are described there."""

    instruction: str
    answer: str
    boxes: np.ndarray
    phrases: tuple[str, ...]

    @property
    def text(self) -> tuple[str, str]:
        """Instruction and answer."""
        return self.instruction, self.answer

    def with_image(
        self, image: np.ndarray, path: str, others: Sequence[tuple[str, str]] | None = None
    ) -> CaptionedImage:
        """The whole, with uint8 [H, W, 3]; `others` of None are those that follow from this one (`implied_texts`)."""
        others = implied_texts(self) if others is None else others
        return CaptionedImage(image=image, path=path, **self._asdict(), others=tuple(others))


def describe_prompt(text: object, row: str) -> Prompt:
    """A plain caption. Raises DataError, naming the row, for one without text."""
    return Prompt(DESCRIBE, check_text(text, row), _no_boxes(), ())


def grounded_prompt(caption: object, spans: Sequence[tuple[int, int, Sequence[float]]], row: str) -> Prompt:
    """A caption with the boxes of its phrases.

    Args:
      caption: the text.
      spans: (first character, the one after the last, box), several with the same characters for several boxes. Of
        phrases that overlap, the one that begins first, then the longer one, is kept.
      row: names the row in messages.

    Raises:
      DataError: no text, no span, a span outside the text, or a box that is none.
    """
    text = check_text(caption, row, strip=False)
    boxes_of: dict[tuple[int, int], list[np.ndarray]] = {}
    for start, end, box in spans:
        if not (float(start).is_integer() and float(end).is_integer() and 0 <= start < end <= len(text)):
            raise DataError(f"{row}: a phrase from {start} to {end} in {len(text)} characters", reason="phrase outside")
        boxes_of.setdefault((int(start), int(end)), []).append(check_box(box, row))
    if not boxes_of:
        raise DataError(f"{row}: no phrase of its caption has a box", reason="no boxes")
    answer, boxes, phrases, place = [], [], [], 0
    for start, end in sorted(boxes_of, key=lambda span: (span[0], -span[1])):
        if start < place:
            continue
        answer += [text[place:start], format_phrase(text[start:end], boxes_of[start, end])]
        boxes += boxes_of[start, end]
        phrases += [text[start:end]] * len(boxes_of[start, end])
        place = end
    return Prompt(DESCRIBE_WITH_BOXES, "".join([*answer, text[place:]]).strip(), np.stack(boxes), tuple(phrases))


def locate_prompt(phrase: object, box: Sequence[float], row: str) -> Prompt:
    """The box of what a phrase speaks of. Raises DataError, naming the row, for an empty phrase or no box."""
    text, corners = check_text(phrase, row), check_box(box, row)
    return Prompt(LOCATE.format(phrase=text), format_box(corners), corners[None], (text,))


def implied_texts(prompt: Prompt) -> list[tuple[str, str]]:
    """(instruction, answer) of what else a text with boxes tells: itself without them, and where each phrase is.

    A phrase that comes up several times has all of its boxes. A text without boxes implies nothing, nor does the box of
    a phrase that was asked for.
    """
    plain = {DESCRIBE_WITH_BOXES: DESCRIBE, TRANSCRIBE_WITH_BOXES: TRANSCRIBE}.get(prompt.instruction)
    if plain is None:
        return []
    boxes_of: dict[str, list[str]] = {}
    for phrase, box in zip(prompt.phrases, prompt.boxes, strict=True):
        boxes_of.setdefault(phrase, []).append(format_box(box))
    located = [(LOCATE.format(phrase=phrase), "".join(boxes)) for phrase, boxes in boxes_of.items()]
    return [(plain, without_boxes(prompt.answer)), *located]


def transcribe_prompt(pieces: Sequence[tuple[object, Sequence[float]]], row: str, *, with_boxes: bool) -> Prompt:
    """Pieces of text in an image, one a line, with or without their boxes.

    Raises:
      DataError: no pieces, one without text, or a box that is none; the message names the row.
    """
    if not pieces:
        raise DataError(f"{row}: holds no text", reason="caption has no text")
    texts = tuple(check_text(text, row) for text, _ in pieces)
    boxes = np.stack([check_box(box, row) for _, box in pieces])
    if not with_boxes:
        return Prompt(TRANSCRIBE, "\n".join(texts), _no_boxes(), ())
    lines = [format_phrase(text, [box]) for text, box in zip(texts, boxes, strict=True)]
    return Prompt(TRANSCRIBE_WITH_BOXES, "\n".join(lines), boxes, texts)


def check_text(text: object, row: str, *, strip: bool = True) -> str:
    """The text, stripped. Raises DataError, naming the row, for none, or for one with tokens that would fake a turn."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{row}: its text is {text!r}, expected some", reason="caption has no text")
    if found := CONTROL.search(text):
        raise DataError(f"{row}: its text holds the token {found[0]}", reason="text holds control tokens")
    return text.strip() if strip else text


def check_box(box: Sequence[float], row: str) -> np.ndarray:
    """float32 [4] within 0 to 1 of corners (x1, y1, x2, y2) as shares of width and height.

    Raises:
      DataError: it has not four finite numbers, x2 <= x1 or y2 <= y1, or it lies further outside than OUTSIDE.
    """
    try:
        corners = np.array(box, np.float64)
    except (TypeError, ValueError):
        corners = np.full(0, np.nan)
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise DataError(f"{row}: a box is {box!r}, expected four numbers", reason="box is none")
    x1, y1, x2, y2 = corners.tolist()
    if x2 <= x1 or y2 <= y1:
        raise DataError(
            f"{row}: a box is ({x1:g}, {y1:g}, {x2:g}, {y2:g}), expected x1 < x2, y1 < y2", reason="box is none"
        )
    if min(x1, y1) < -OUTSIDE or max(x2, y2) > 1 + OUTSIDE:
        raise DataError(
            f"{row}: a box is ({x1:g}, {y1:g}, {x2:g}, {y2:g}), expected shares 0 to 1", reason="box outside"
        )
    cut = np.clip(corners, 0, 1).astype(np.float32)
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise DataError(f"{row}: a box lies beside the image: ({x1:g}, {y1:g}, {x2:g}, {y2:g})", reason="box outside")
    return cut


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4), np.float32)
