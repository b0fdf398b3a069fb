"""Pictures of what a model says: an image with the boxes it gives, the true ones, and its words below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnistream_jax.data.boxes import parse_boxes
from omnistream_jax.data.picture import beside
from omnistream_jax.data.readers.captions import DESCRIBE, LOCATE
from omnistream_jax.data.world import WorldCaptions
from omnistream_jax.evals.world_captions import Answer, Box

_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_TRUE, _PREDICTED = (0, 158, 115), (213, 94, 0)  # told apart by the colour-blind (Okabe and Ito 2008)
_TEXT, _GAP, _LINE = 12, 4, 2
_SMALLEST = 64


def box_picture(
    image: np.ndarray, text: str, predicted: Sequence[Box], true: Sequence[Box] = (), side: int = 288
) -> np.ndarray:
    """An image with boxes, and text below in as many lines as it takes.

    Args:
      image: uint8 [H, W, 3].
      text: paragraphs, parted by line breaks.
      predicted: boxes (x1, y1, x2, y2) as shares of width and height; orange. What lies outside is cut.
      true: the same; green.
      side: width of the picture in pixels, 64 or more; the image keeps its proportions.

    Returns:
      uint8 [height, side, 3].

    Raises:
      ValueError: the image is no uint8 [H, W, 3], or the side is too small.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]")
    if side < _SMALLEST:
        raise ValueError(f"side is {side}, expected {_SMALLEST} or more")
    height = max(1, round(side * image.shape[0] / image.shape[1]))
    shown = Image.fromarray(image).resize((side, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(shown)
    for boxes, colour in ((true, _TRUE), (predicted, _PREDICTED)):
        for box in boxes:
            _draw_box(draw, box, (side, height), colour)
    words = _set_text(text, side)
    page = Image.new("RGB", (side, height + words.height), _PAPER)
    page.paste(shown, (0, 0))
    page.paste(words, (0, height))
    return np.asarray(page)


def described_pictures(answer: Answer, captions: WorldCaptions, count: int = 3, side: int = 288) -> np.ndarray:
    """The first pictures that are to be described, side by side: what a model says of them, and where it sees a thing.

    Args:
      answer: the model, as in evals/world_captions.py; it is called twice, for captions and for boxes.
      captions: the pictures; each shows the box of the first thing that its own caption names.
      count: how many.
      side: of each, pixels.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: the records hold fewer descriptions than `count`.
    """
    places = [index for index in range(len(captions)) if captions.task(index) == "describe"][:count]
    if not 1 <= count == len(places):
        raise ValueError(f"{captions.name}: {count} pictures of {len(places)} descriptions, expected 1 to all of them")
    records = [captions.read(index) for index in places]
    images = np.stack([record.image for record in records])
    said = answer(images, [DESCRIBE] * count)
    located = answer(images, [LOCATE.format(phrase=record.phrases[0]) for record in records])
    pictures = []
    for record, caption, text in zip(records, said, located, strict=True):
        boxes = [box.corners for box in parse_boxes(text)[:1]]
        legend = f"{record.phrases[0]}: {'predicted orange' if boxes else 'no box predicted'}, true green"
        words = "\n".join([caption.strip() or "(no caption)", legend])
        pictures.append(Image.fromarray(box_picture(record.image, words, boxes, [record.boxes[0]], side)))
    return np.asarray(beside(pictures))


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    """An outline within the picture; a box turned inside out is drawn as a line."""
    x1, y1, x2, y2 = (
        min(max(float(share), 0.0), 1.0) * (length - 1) for share, length in zip(box, size * 2, strict=True)
    )
    draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour, width=_LINE)


def _set_text(text: str, width: int) -> Image.Image:
    """Paragraphs in lines of a width, on paper as high as they need."""
    font = ImageFont.load_default(size=_TEXT)
    words = "how wide letters are in the mean"
    letters = max(1, int((width - 2 * _GAP) / (1.1 * font.getlength(words) / len(words))))
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, letters) or [""]]
    height = (_TEXT + _GAP) * len(lines) + 2 * _GAP if lines else 0
    paper = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(paper)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + number * (_TEXT + _GAP)), line, _INK, font)
    return paper
