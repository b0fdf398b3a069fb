"""Captions as tokens: one turn of the user and the assistant's each, and several turns packed into a row.

The text of a turn is what Qwen3's chat template writes for an answer without thinking (`enable_thinking=False`), up to
the token that ends it; the line break that the template writes after that is not learned, and left out:

    <|im_start|>user
    {instruction}<|im_end|>
    <|im_start|>assistant
    <think>

    </think>

    {answer}<|im_end|>
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.captions import BOX_END, BOX_START

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"
PROMPT = (
    f"{TURN_START}user\n{{}}{TURN_END}\n{TURN_START}assistant\n{THINK_START}\n\n{THINK_END}\n\n"  # of an instruction
)


class Turn(NamedTuple):
    """A caption as tokens, whole: what comes before the answer, the answer, and the token that ends it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return sum(map(len, self))


class Chat:
    """Text to tokens and rows of them, by a tokenizer's JSON file. Made by `load_chat`.

    Attributes:
      vocabulary_size: one more than the largest token that can come up.
    """

    def __init__(self, path: str):
        self._tokenizer = _load(path)
        self.vocabulary_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._end = (self._tokenizer.token_to_id(TURN_END),)
        self._box = tuple(self._tokenizer.token_to_id(token) for token in (BOX_START, BOX_END))  # None: has no such

    def turn(self, instruction: str, answer: str, path: str) -> Turn:
        """Both texts as tokens. Raises DataError, naming the caption `path`, for an answer of none."""
        target = self._encode(answer)
        if not target:
            raise DataError(f"{path}: its caption has no tokens", reason="caption has no text")
        return Turn(self._encode(PROMPT.format(instruction)), target, self._end)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def shorten(self, turn: Turn, length: int) -> Turn:
        """A turn of `length` tokens or fewer: its answer is cut at a token, before a box that would lose its end.

        No token of the answer may be left: of a length that leaves some, every larger one does.
        """
        if turn.length <= length:
            return turn
        room = max(length - len(turn.prompt) - len(turn.end), 0)
        return turn._replace(answer=self._whole_boxes(turn.answer[:room]))

    def _whole_boxes(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens up to a box that was begun and not ended."""
        start, end = self._box
        for place in range(len(tokens) - 1, -1, -1):
            if tokens[place] == end:
                break
            if tokens[place] == start:
                return tokens[:place]
        return tokens

    def pack(self, turns: Sequence[Turn], max_tokens: int) -> dict[str, np.ndarray]:
        """Turns one after another in a row of `max_tokens`: the arrays of tokens in `schema.CaptionBatch`, without B.

        Where they are longer together, the longest are cut, all to about one length (`shares`).
        """
        row = {name: np.zeros(max_tokens, np.int32) for name in ("tokens", "segment", "position")}
        row["target_mask"] = np.zeros(max_tokens, bool)
        row["cut"] = np.zeros(len(turns), bool)
        start = 0
        for number, (turn, share) in enumerate(zip(turns, shares([t.length for t in turns], max_tokens), strict=True)):
            kept = self.shorten(turn, share)
            place = slice(start, start + kept.length)
            row["tokens"][place] = [token for part in kept for token in part]
            row["segment"][place] = number + 1
            row["position"][place] = np.arange(kept.length)
            row["target_mask"][start + len(kept.prompt) : place.stop] = True
            row["cut"][number] = kept.length < turn.length
            start = place.stop
        return row


def shares(lengths: Sequence[int], total: int) -> list[int]:
    """How much of `total` each gets that needs a length: max-min fair (Bertsekas and Gallager, Data Networks, 6.5.2).

    All get what they need where there is enough; else the short ones do, and the others alike but for the remainder.
    Each gets its length or total // len(lengths), or more, whatever the others need.
    """
    left, given = total, [0] * len(lengths)
    for done, place in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        given[place] = min(lengths[place], left // (len(lengths) - done))
        left -= given[place]
    return given


@functools.lru_cache(maxsize=4)  # megabytes of JSON: once a process
def load_chat(path: str) -> Chat:
    """The chat of a `tokenizer.json` in the Hugging Face layout. Raises DataError for none, or one unlike Qwen3's."""
    return Chat(path)


def _load(path: str) -> Any:
    from tokenizers import Tokenizer  # not everyone who uses data/ has or needs it

    if not os.path.isfile(path):
        raise DataError(f"tokenizer: there is no file {path!r}, expected a tokenizer's JSON file")
    try:
        loaded = Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"tokenizer: {path} is no tokenizer's JSON file ({error})") from error
    for token in (TURN_START, TURN_END, THINK_START, THINK_END):
        number = loaded.token_to_id(token)
        if number is None or loaded.encode(token, add_special_tokens=False).ids != [number]:
            raise DataError(f"tokenizer: {path} has no token {token}, expected Qwen3's chat tokens")
    loaded.no_padding()
    loaded.no_truncation()
    return loaded
