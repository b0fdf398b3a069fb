"""Captions as tokens: one turn of the user and the assistant's each, and several turns packed into a row.

The text of a turn is what Qwen3's chat template writes for an answer without thinking (`enable_thinking=False`), up to
the token that ends it; the line break that the template writes after that is not learned, and left out:

    <|im_start|>user
    {instruction}<|im_end|>
    <|im_start|>assistant
    <think>

    </think>

    {answer}<|im_end|>

Any tokenizer with these tokens does, from a directory or the hub as from a file; "embedded" comes with the package.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from omnistream_jax.data.boxes import BOX_END, BOX_START, REF_END, REF_START
from omnistream_jax.data.errors import DataError
from omnistream_jax.utils.files import write_json, written_aside
from omnistream_jax.utils.segments import SHARED

EMBEDDED = "embedded"
"""Names the tokenizer that comes with the package (data/embedded/make_tokenizer.py says what it is)."""
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK_START, THINK_END = "<think>", "</think>"
PROMPT = (
    f"{TURN_START}user\n{{}}{TURN_END}\n{TURN_START}assistant\n{THINK_START}\n\n{THINK_END}\n\n"  # of an instruction
)
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
"""PROMPT for `transformers` (Jinja), and for talks of several turns: Qwen3's template without thinking and tools."""
CONTROL = re.compile(r"<\|\w+\|>|</?think>")
"""Tokens that mean something to the decoder."""
PADDING = 0
"""The token where a row has no text. Any would do: segment 0 tells it from text, and nothing attends to it."""

_IN_TEXT = {BOX_START, BOX_END, REF_START, REF_END}
_INCOMPLETE = "\ufffd"  # what a decoder of bytes makes of those that are no whole character


def control_tokens(text: str) -> list[str]:
    """The control tokens in a text that would fake a turn, sorted; boxes and their phrases may stand there."""
    return sorted(set(CONTROL.findall(text)) - _IN_TEXT)


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
    """Text to tokens and back, and rows of them, by a tokenizer. Made by `load_chat`.

    Attributes:
      path: what it was loaded from.
      vocabulary_size: one more than the largest token that can come up.
      end: the token that ends a turn.
      stops: the tokens that end what a decoder says: `end`, and the one that ends a text, where the tokenizer has it.
    """

    def __init__(self, path: str):
        self.path = path
        self._tokenizer = _load(path)
        self.vocabulary_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end: int = self._tokenizer.token_to_id(TURN_END)
        text_end = self._tokenizer.token_to_id(TEXT_END)
        self.stops: tuple[int, ...] = (self.end,) if text_end is None else (self.end, text_end)
        self._box = tuple(self._tokenizer.token_to_id(token) for token in (BOX_START, BOX_END))  # None: has no such

    def check_vocabulary(self, decoder_vocabulary: int) -> None:
        """Raises DataError where a decoder with a vocabulary of that size lacks tokens that can come up.

        A larger one is none: models pad their vocabulary (Qwen3: 151,936 for 151,669 tokens).
        """
        if self.vocabulary_size > decoder_vocabulary:
            raise DataError(
                f"tokenizer: {self.path} has tokens up to {self.vocabulary_size - 1}, expected less than the decoder's "
                f"vocabulary of {decoder_vocabulary}"
            )

    def prompt(self, instruction: str) -> tuple[int, ...]:
        """The tokens before an answer, for a decoder to go on from.

        Raises:
          DataError: the instruction has no text, or control tokens that would fake a turn.
        """
        if not instruction.strip():
            raise DataError(f"instruction: {instruction!r}, expected a text")
        if found := control_tokens(instruction):
            raise DataError(f"instruction: {instruction!r} holds {', '.join(found)}, expected text without it")
        return self._before(instruction)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens before the first of `stops`, with the tokens of boxes and phrases; see data/boxes.py.

        Bytes that are no whole character become U+FFFD. Numbers that are no token of the tokenizer are left out.
        """
        kept = []
        for token in tokens:
            if token in self.stops:
                break
            kept.append(int(token))
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one text whose tokens come one by one."""
        return StreamDecoder(self)

    def save(self, directory: str) -> None:
        """Writes what lets `transformers` talk with a decoder of these tokens into the decoder's directory.

        `tokenizer.json`; `tokenizer_config.json`, with the template of a talk, and without which a config.json there
        that says Qwen3 would have the tokenizer compose accents (NFC) whatever the first says; and
        `generation_config.json`, with the tokens that end an answer. `load_chat` of the directory or of
        `tokenizer.json` in it gives the same tokens as this.
        """
        with written_aside(os.path.join(directory, "tokenizer.json")) as aside:
            aside.write_text(self._tokenizer.to_str() + "\n", encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURN_END, "chat_template": TEMPLATE}
        write_json(os.path.join(directory, "tokenizer_config.json"), settings)
        write_json(os.path.join(directory, "generation_config.json"), {"eos_token_id": list(self.stops)})

    def turn(self, instruction: str, answer: str, path: str) -> Turn:
        """Both texts as tokens. Raises DataError, naming the caption `path`, for an answer of none."""
        target = self._encode(answer)
        if not target:
            raise DataError(f"{path}: its caption has no tokens", reason="caption has no text")
        return Turn(self._before(instruction), target, (self.end,))

    def _before(self, instruction: str) -> tuple[int, ...]:
        return self._encode(PROMPT.format(instruction))

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

    def pack(self, turns: Sequence[Sequence[Turn]], max_tokens: int) -> dict[str, np.ndarray]:
        """The turns about K images, less than SHARED each, one after another in a row of `max_tokens`.

        Where they are longer together, the longest are cut, all to about one length (`shares`).

        Returns:
          The arrays of tokens in `schema.CaptionBatch`, without B.
        """
        row = {name: np.zeros(max_tokens, np.int32) for name in ("segment", "position")}
        row["tokens"] = np.full(max_tokens, PADDING, np.int32)
        row["target_mask"] = np.zeros(max_tokens, bool)
        row["cut"] = np.zeros(len(turns), bool)
        row["texts"] = np.array([len(some) for some in turns], np.int32)
        placed = [(image, text, turn) for image, some in enumerate(turns) for text, turn in enumerate(some, start=1)]
        given = shares([turn.length for *_, turn in placed], max_tokens)
        start = 0
        for (image, text, turn), share in zip(placed, given, strict=True):
            kept = self.shorten(turn, share)
            place = slice(start, start + kept.length)
            row["tokens"][place] = [token for part in kept for token in part]
            row["segment"][place] = SHARED * (image + 1) + text
            row["position"][place] = np.arange(kept.length)
            row["target_mask"][start + len(kept.prompt) : place.stop] = True
            row["cut"][image] |= kept.length < turn.length
            start = place.stop
        return row


class StreamDecoder:
    """The text of tokens that come one by one, in whole characters: what `add` and `finish` return is `Chat.decode`'s.

    Attributes:
      ended: one of the chat's `stops` has come; what comes after it is ignored.
    """

    def __init__(self, chat: Chat):
        self._chat = chat
        self._told_before: list[int] = []  # the latest tokens whose text was told to its end: decoders may join by it
        self._tokens: list[int] = []  # those since
        self._told = 0  # characters of their text
        self.ended = False

    def add(self, token: int) -> str:
        """The text that a token makes whole, "" for none: a character's bytes may be those of several tokens."""
        if self.ended:
            return ""
        if token in self._chat.stops:
            self.ended = True
            return self.finish()
        self._tokens.append(int(token))
        text = self._text()
        # Bytes that may be the beginning of a character are one U+FFFD at the end. All before it is settled.
        new = self._tell(text.removesuffix(_INCOMPLETE))
        if text and not text.endswith(_INCOMPLETE):
            self._told_before, self._tokens, self._told = self._tokens, [], 0
        return new

    def finish(self) -> str:
        """What was held back, as U+FFFD, where no token comes any more. Nothing after a token that ends the text."""
        return self._tell(self._text())

    def _text(self) -> str:
        before = self._chat.decode(self._told_before)
        return self._chat.decode(self._told_before + self._tokens)[len(before) :]

    def _tell(self, text: str) -> str:
        new, self._told = text[self._told :], len(text)
        return new


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
    """The chat of a tokenizer.

    Args:
      path: "embedded"; a directory or hub id that `transformers.AutoTokenizer` reads, code of its own aside; or a
        `tokenizer.json` in the Hugging Face layout, which is read without transformers.

    Raises:
      DataError: there is none, it cannot be read, or it lacks Qwen3's chat tokens.
    """
    return Chat(path)


def _load(path: str) -> Any:
    if path == EMBEDDED:
        from omnistream_jax.data.embedded import TOKENIZER  # imports the decoders of video

        loaded = _read_file(os.fspath(TOKENIZER))
    elif os.path.isdir(path) or _may_be_hub_id(path):
        loaded = _read_pretrained(path)
    else:
        loaded = _read_file(path)
    for token in (TURN_START, TURN_END, THINK_START, THINK_END):
        number = loaded.token_to_id(token)
        if number is None or loaded.encode(token, add_special_tokens=False).ids != [number]:
            raise DataError(f"tokenizer: {path} has no token {token}, expected Qwen3's chat tokens")
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _may_be_hub_id(path: str) -> bool:
    """An owner and a name, where there is no such file."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None and not (path.endswith(".json") or os.path.exists(path))


def _read_file(path: str) -> Any:
    try:
        from tokenizers import Tokenizer  # not everyone who uses data/ has or needs it
    except ImportError:
        raise DataError(f"tokenizer: {path} needs the package tokenizers: pip install -e .") from None
    if not os.path.isfile(path):
        raise DataError(
            f"tokenizer: there is no file or directory {path!r}, expected a tokenizer's JSON file, its directory, "
            f'a hub id or "{EMBEDDED}"'
        )
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"tokenizer: {path} is no tokenizer's JSON file ({error})") from error


def _read_pretrained(name: str) -> Any:
    """The tokenizer within the one of transformers: what encodes and decodes there."""
    try:
        from transformers import AutoTokenizer  # takes seconds
    except ImportError:
        raise DataError(
            f"tokenizer: {name} needs the package transformers: pip install -e '.[hf]', "
            "or name its file tokenizer.json, which does not"
        ) from None
    expected = "a directory or a hub repository with a tokenizer"
    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # by default it may ask at the terminal
    except Exception as error:  # of many kinds: of the hub, the connection, the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:;")
        raise DataError(f"tokenizer: {name} cannot be read, expected {expected} ({reason})") from error
    if not loaded.is_fast:
        raise DataError(
            f"tokenizer: {name} is a {type(loaded).__name__}, expected {expected} of the package tokenizers"
        )
    return loaded.backend_tokenizer
