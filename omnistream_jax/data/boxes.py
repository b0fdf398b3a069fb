"""Boxes as text, the one format in use, written and parsed back.

Boxes are written as Qwen's models have them, in tokens that their vocabulary holds:

    <|object_ref_start|>a red car<|object_ref_end|><|box_start|>(112,250),(498,731)<|box_end|>

(x1,y1),(x2,y2) are the top left and the bottom right corner in whole thousandths of the picture's width and height,
0 to 999, rounded down; each digit is a token. The phrase that a box is of stands right before it, or is left out;
several boxes may follow a phrase. To the decoder the picture is the square that it sees (`captions.letterbox`).

Shares of width and height, 0 to 1, stand for thousandths everywhere but in text. A number read stands for the middle
of its thousandth, so that writing and reading move a corner by half a thousandth at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from omnistream_jax.data.errors import DataError

REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2

_NUMBER = "([0-9]{1,3})"
_WRITTEN = re.escape(f"{BOX_START}(#,#),(#,#){BOX_END}").replace(r"\#", _NUMBER)
_BOX = re.compile(_WRITTEN)
# A phrase holds no other token, so that one that was begun and not ended is none.
_PHRASE = rf"{re.escape(REF_START)}(?P<phrase>(?:(?!<\|).)*){re.escape(REF_END)}\s*"
_GROUP = re.compile(rf"(?:{_PHRASE})?(?P<boxes>(?:{_WRITTEN}\s*)+)", re.DOTALL)


class NamedBox(NamedTuple):
    """A box read from text: the phrase that it is of, if one stands before it, and (x1, y1, x2, y2) in shares."""

    phrase: str | None
    corners: Corners


def format_box(box: Sequence[float]) -> str:
    """A box (x1, y1, x2, y2) in shares of width and height as text. Raises DataError for a share outside 0 to 1."""
    if len(box) != 4 or not all(0 <= share <= 1 for share in box):
        raise DataError(f"a box is {tuple(box)}, expected four shares from 0 to 1")
    return _write(min(999, int(float(share) * 1000 + 1e-4)) for share in box)  # float32's 0.7 is 0.69999999


def format_phrase(phrase: str, boxes: Sequence[Sequence[float]]) -> str:
    """A phrase as text, and right after it the boxes of what it speaks of; errors as of `format_box`."""
    return f"{REF_START}{phrase}{REF_END}" + "".join(map(format_box, boxes))


def parse_boxes(text: str) -> list[NamedBox]:
    """The boxes of a text, in its order, with their phrases.

    Made for what a decoder says: nothing is an error. What is not written as a box is skipped, and counted by
    `malformed_boxes`. Corners may come in any order: the smaller of x1 and x2 becomes the left, of y1 and y2 the top.
    Corners in the same thousandth leave a box without area. White space may stand before a box.
    """
    found = []
    for group in _GROUP.finditer(text):
        phrase = (group["phrase"] or "").strip() or None
        for match in _BOX.finditer(group["boxes"]):
            x1, y1, x2, y2 = ((int(number) + 0.5) / 1000 for number in match.groups())
            found.append(NamedBox(phrase, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))))
    return found


def malformed_boxes(text: str) -> int:
    """How many boxes a text begins or ends that are not written as one."""
    return max(text.count(BOX_START), text.count(BOX_END)) - len(_BOX.findall(text))


def without_boxes(text: str) -> str:
    """A text without its boxes and the tokens of phrases; the phrases stay."""
    return _BOX.sub("", text).replace(REF_START, "").replace(REF_END, "")


def move_boxes(text: str, shown: tuple[float, float]) -> str:
    """The boxes of a text, of an image, as boxes of the square that the image takes `shown` shares of.

    Raises:
      DataError: there is a box that is not written as such.
    """
    if malformed_boxes(text):
        raise DataError(f"a box is not written as {BOX_START}(x1,y1),(x2,y2){BOX_END}: {text!r}")
    return _BOX.sub(lambda match: _write(_moved(match.groups(), shown)), text)


def restore_boxes(text: str, shown: tuple[float, float]) -> str:
    """The boxes of a text, of the square, as boxes of the image in it: the reverse of `move_boxes`.

    Made for what a decoder says: a corner beside the image moves to its border, and what is not written as a box stays.
    """
    grown = (1 / shown[0], 1 / shown[1])
    return _BOX.sub(lambda match: _write(min(999, place) for place in _moved(match.groups(), grown)), text)


def _moved(numbers: Sequence[str], shown: tuple[float, float]) -> list[int]:
    return [int((int(number) + 0.5) * share) for number, share in zip(numbers, (*shown, *shown), strict=True)]


def _write(thousandths: Iterable[int]) -> str:
    x1, y1, x2, y2 = thousandths
    return f"{BOX_START}({x1},{y1}),({x2},{y2}){BOX_END}"
