"""The data of language: captioned images -> a square picture and its text as tokens -> batches of fixed length.

The picture keeps its proportions: it is resized to fit a square and laid into its top left corner. Nothing else is
done to it: a crop could cut away what the text speaks of, a mirror would swap its left and right, other colours would
belie it. Boxes in the text, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` in thousandths (0 to 999) of the image, become
thousandths of the square: what the decoder says about places refers to what the backbone sees.

One image has one caption, so a row holds one caption and padding.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError, because, require_field
from omnistream_jax.data.mixture import MixtureData
from omnistream_jax.data.readers.captions import BOX_END, BOX_START, CONTROL, REF_END, REF_START, CaptionSource
from omnistream_jax.data.schema import CaptionedImage

PADDING = (124, 116, 104)  # ImageNet's mean colour: near 0 once the model has normalised it
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_BOX = re.compile(re.escape(BOX_START) + r"\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)" + re.escape(BOX_END))
_MAY_STAND_IN_TEXT = {BOX_START, BOX_END, REF_START, REF_END}


class Encoded(NamedTuple):
    """A caption as tokens: int32 [L], two bool [L] and whether the answer lost its end; see `schema.CaptionBatch`."""

    tokens: np.ndarray
    target_mask: np.ndarray
    token_valid: np.ndarray
    cut: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionData(MixtureData[CaptionSource]):
    """Batches of captioned images; see `schema.CaptionBatch`. Nothing in them is random but their order.

    Attributes:
      tokenizer: a tokenizer's JSON file (`tokenizer.json` of the Hugging Face layout) that has Qwen3's chat tokens.
      max_tokens: L, tokens of a row; longer answers are cut, and still end with the token that ends them.
      size: S, side of the square in pixels.
    """

    tokenizer: str
    max_tokens: int = 256
    size: int = 224

    def __post_init__(self):
        super().__post_init__()
        require_field(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        require_field(self.size >= 1, "size", self.size, "1 or more")
        _load(self.tokenizer)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token that can come up."""
        return max(_load(self.tokenizer).get_vocab(with_added_tokens=True).values()) + 1

    def _sample(self, place: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        source = self.sources[place]
        with because("image or caption cannot be read"):
            sample = source.read(index)
        with because("text cannot be used"):
            check_text(sample)
            image, shown = letterbox(sample.image, self.size)
            instruction, answer = (move_boxes(text, shown) for text in (sample.instruction, sample.answer))
            encoded = encode(self.tokenizer, instruction, answer, self.max_tokens, sample.path)
        return {"image": image[None], **encoded._asdict(), "cut": np.bool_(encoded.cut)}


def check_text(sample: CaptionedImage) -> None:
    """Raises DataError for an answer with no text, and for text with control tokens, which would fake a turn."""
    if not sample.answer.strip():
        raise DataError(f"{sample.path}: its caption has no text", reason="caption has no text")
    found = set(CONTROL.findall(sample.instruction + " " + sample.answer)) - _MAY_STAND_IN_TEXT
    if found:
        raise DataError(f"{sample.path}: its text holds {', '.join(sorted(found))}", reason="text holds control tokens")


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


def move_boxes(text: str, shown: tuple[float, float]) -> str:
    """The boxes of a text, in thousandths of an image, as thousandths of the square that it takes `shown` shares of.

    Raises:
      DataError: there is a box that is not written as such.
    """

    def moved(match: re.Match[str]) -> str:
        # Boxes are rounded down when written: a number stands for the middle of its thousandth.
        x1, y1, x2, y2 = (
            int((int(number) + 0.5) * share) for number, share in zip(match.groups(), (*shown, *shown), strict=True)
        )
        return f"{BOX_START}({x1},{y1}),({x2},{y2}){BOX_END}"

    if len(_BOX.findall(text)) != max(text.count(BOX_START), text.count(BOX_END)):
        raise DataError(f"a box is not written as {BOX_START}(x1,y1),(x2,y2){BOX_END}: {text!r}")
    return _BOX.sub(moved, text)


def encode(tokenizer: str, instruction: str, answer: str, max_tokens: int, path: str) -> Encoded:
    """A turn of the user and the assistant's in Qwen3's chat format, padded to max_tokens.

    An answer that is too long is cut at a token, before a box that would lose its end, and still ends with the token
    that ends a turn.

    Raises:
      DataError: the instruction leaves no room for an answer; `path` names the caption.
    """
    loaded = _load(tokenizer)
    asked = f"{TURN_START}user\n{instruction}{TURN_END}\n{TURN_START}assistant\n"
    prompt = loaded.encode(asked, add_special_tokens=False).ids
    target = loaded.encode(answer, add_special_tokens=False).ids
    if not target:
        raise DataError(f"{path}: its caption has no tokens", reason="caption has no text")
    room = max_tokens - len(prompt) - 1
    cut = len(target) > room
    if cut:
        target = _whole_boxes(target[: max(room, 0)], loaded.token_to_id(BOX_START), loaded.token_to_id(BOX_END))
    if not target:
        raise DataError(
            f"{path}: {max_tokens} tokens leave no room for an answer after an instruction of {len(prompt)}",
            reason="no room for an answer",
        )
    used = [*prompt, *target, loaded.token_to_id(TURN_END)]
    tokens = np.zeros(max_tokens, np.int32)
    tokens[: len(used)] = used
    position = np.arange(max_tokens)
    valid = position < len(used)
    return Encoded(tokens, valid & (position >= len(prompt)), valid, cut)


def _whole_boxes(tokens: list[int], start: int | None, end: int | None) -> list[int]:
    """The tokens up to a box that was begun and not ended."""
    for place in range(len(tokens) - 1, -1, -1):
        if tokens[place] == end:
            break
        if tokens[place] == start:
            return tokens[:place]
    return tokens


@functools.lru_cache(maxsize=4)  # megabytes of JSON: once a process
def _load(path: str) -> Any:
    from tokenizers import Tokenizer  # not everyone who uses data/ has or needs it

    if not os.path.isfile(path):
        raise DataError(f"tokenizer: there is no file {path!r}, expected a tokenizer's JSON file")
    try:
        loaded = Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"tokenizer: {path} is no tokenizer's JSON file ({error})") from error
    for token in (TURN_START, TURN_END):
        number = loaded.token_to_id(token)
        if number is None or loaded.encode(token, add_special_tokens=False).ids != [number]:
            raise DataError(f"tokenizer: {path} has no token {token}, expected Qwen3's chat tokens")
    loaded.no_padding()
    loaded.no_truncation()
    return loaded
