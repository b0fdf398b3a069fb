"""A question about a live stream, answered from the features that the stream has given: nothing is encoded again.

The decoder is shown the newest frame and, before it, some of the past, evenly spread (`KeptFrames`); then the question:

    past frames, in the decoder's cache     newest frame   question     answer
    0      8      16      24      32     |       37      | What ...? | A red ...
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import live_geometry
from omnistream_jax.config import ConfigError
from omnistream_jax.data.boxes import malformed_boxes
from omnistream_jax.data.errors import DataError
from omnistream_jax.generate import bucket_capacity, bucket_length, embed_prompts, generate, prefill
from omnistream_jax.geometry_model import GeometryModel
from omnistream_jax.language_model import LanguageModel, load_language
from omnistream_jax.live_result import Answer, LiveError, Result
from omnistream_jax.model import Model, dtype_of
from omnistream_jax.models.projector import DECODER, PROJECTOR, project
from omnistream_jax.models.qwen3 import DecoderCache, decoding_params, empty_cache

ANSWERS = "answers.jsonl"


def load(config: ConfigDict) -> tuple[Model | GeometryModel, "Question | None"]:
    """The checkpoint that the config names, with what the config asks for: geometry heads, and a question's decoder.

    Raises:
        WeightsError: the checkpoint cannot be read, or lacks one of the two.
        ConfigError: `question`, or a field of `answer`, does not fit.
        ValueError: `compute_dtype` names no type.
    """
    if not config.question:
        return live_geometry.load(config), None
    language = load_language(config.checkpoint, dtype=dtype_of(config.compute_dtype))
    model = live_geometry.load(config) if config.geometry.enabled else language.model
    side = language.model.config.patch_size
    patches = (config.height // side) * (config.width // side)
    return model, Question(language, config.question, patches, **config.answer)


class Question:
    """A question and what answers it: projector, decoder and tokenizer. The language model itself is not kept.

    Args:
        language: gives the three.
        text: the question. Boxes in it, and in its answers, are those of the frames as the model sees them.
        patches: P, visual tokens of a frame.
        every: frames from one answer to the next; 0: one answer, at the end.
        max_frames: frames that the decoder is shown, the newest included.
        max_tokens: of an answer, the token that ends it included.

    Raises:
        ConfigError: naming the field that does not fit.
    """

    def __init__(
        self, language: LanguageModel, text: str, patches: int, *, every: int, max_frames: int, max_tokens: int
    ):
        for name, value, least in (("every", every, 0), ("max_frames", max_frames, 1), ("max_tokens", max_tokens, 1)):
            if value < least:
                raise ConfigError(f"answer.{name}: expected {least} or more, got {value}")
        prompt = _prompt(language, text)
        longest = language.decoder.config.max_length
        if max_frames * patches + len(prompt) + max_tokens > longest:
            raise ConfigError(
                f"question: {max_frames} frames of {patches:,} visual tokens (answer.max_frames), {len(prompt):,} "
                f"tokens of the question and {max_tokens:,} of the answer (answer.max_tokens) are too long, expected "
                f"at most {longest:,} together"
            )
        self.text, self.every, self.max_frames, self.max_tokens = text, every, max_frames, max_tokens
        self._chat, self._projector = language.chat, (language.projector, language.params[PROJECTOR])
        decoder = language.decoder.clone(decoding=True)
        self._decoder = decoder, decoding_params(language.params[DECODER], decoder.dtype)
        embedded, _ = embed_prompts(*self._decoder, [prompt])
        self._embedded = embedded[:, : len(prompt)]
        # Room for the longest row that can come, from the beginning: so each program is compiled for one size.
        asked = patches + len(prompt)
        longest = max(bucket_length(asked), asked + max_tokens - 1)
        self._capacity = bucket_capacity((max_frames - 1) * patches + longest)

    def open_cache(self) -> DecoderCache:
        """The decoder before the first frame; it has room for `max_frames`, the question and its answer."""
        decoder, _ = self._decoder
        return empty_cache(decoder.config, 1, self._capacity, decoder.dtype)

    def show(self, cache: DecoderCache, patches: np.ndarray) -> DecoderCache:
        """Show the decoder a further frame, patches [h, w, d]; the cache is consumed."""
        return prefill(*self._decoder, self._visual_tokens(patches), cache=cache)

    def answer(self, cache: DecoderCache, patches: np.ndarray, max_tokens: int | None = None) -> str:
        """What the decoder says, the likeliest tokens, behind a cache and one more frame, which the cache does not get.

        Args:
            cache: stays as it is.
            patches: [h, w, d], of the newest frame.
            max_tokens: fewer than the question's own; None: those.

        Raises:
            ValueError: the decoder gives logits that are not numbers.
        """
        embeddings = jnp.concatenate([self._visual_tokens(patches), self._embedded], axis=1)
        ends = {"max_tokens": max_tokens or self.max_tokens, "stop_tokens": self._chat.stops}
        (tokens,) = generate(*self._decoder, embeddings, cache=cache, **ends)
        return self._chat.decode(tokens[tokens >= 0].tolist())

    def _visual_tokens(self, patches: np.ndarray) -> jax.Array:
        """[1, P, D]."""
        return project(*self._projector, patches[None, None])


def _prompt(language: LanguageModel, text: str) -> tuple[int, ...]:
    """The question's tokens, and those that open the answer."""
    if malformed_boxes(text):
        raise ConfigError(f"question: {text!r} holds a box that is not written as one (data/boxes.py)")
    try:
        return language.chat.prompt(text)
    except DataError as error:
        raise ConfigError(f"question: {str(error).removeprefix('instruction: ')}") from error


class KeptFrame(NamedTuple):
    """A frame's index in the stream and its patches [h, w, d]."""

    index: int
    patches: np.ndarray


class KeptFrames:
    """The newest frame of a stream, and frames of its past: every one, every second, every fourth, and so on.

    The step doubles whenever they would be more than `most`, so that the past always spans the stream from its first
    frame on, and from the time that it is full holds at least half of them. Of `most` 1, there is no past.
    """

    def __init__(self, most: int):
        self._most, self._step = most, 1
        self.past: list[KeptFrame] = []
        self.newest: KeptFrame | None = None

    def add(self, frame: KeptFrame) -> bool:
        """The next frame of the stream; whether some of the past have been left out."""
        before, self.newest = self.newest, frame
        if before is None or self._most == 1 or before.index % self._step:
            return False
        self.past.append(before)
        if len(self.past) < self._most:
            return False
        self.past, self._step = self.past[::2], 2 * self._step
        return True

    @property
    def indices(self) -> tuple[int, ...]:
        """Of the frames that are kept, in order."""
        return tuple(frame.index for frame in (*self.past, self.newest) if frame is not None)


class AskedStream:
    """Answers a question about the stream so far. Its memory, and the time for an answer, stay the same for ever.

    Until it is asked, a frame costs nothing. Asked, the decoder reads the frames of the past that it has not read
    yet, each once, then the newest one and the question. Only when the past was thinned, after `max_frames` frames,
    twice as many, four times and so on, does it read what is left of it again; frames are never encoded again.
    """

    def __init__(self, question: Question):
        self._question, self._kept = question, KeptFrames(question.max_frames)
        self._cache: DecoderCache | None = None
        self._read = 0  # frames of the past that are in the cache

    def add(self, index: int, patches: np.ndarray) -> None:
        """The next frame: its index and its patches [h, w, d]."""
        if self._kept.add(KeptFrame(index, patches)):
            self._cache, self._read = None, 0

    def answer(self, max_tokens: int | None = None) -> str:
        """The answer after at least one frame; see `Question.answer`. Raises LiveError for a decoder that is broken."""
        if self._cache is None:
            self._cache = self._question.open_cache()
        for frame in self._kept.past[self._read :]:
            self._cache = self._question.show(self._cache, frame.patches)
            self._read += 1
        try:
            return self._question.answer(self._cache, self._kept.newest.patches, max_tokens)
        except ValueError as error:
            raise LiveError(f"question: {error}") from error

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames that an answer is about, by index."""
        return self._kept.indices


def warm_up(question: Question, patches: np.ndarray) -> None:
    """Compile what answers take, on the patches [h, w, d] of any frame."""
    asked = AskedStream(question)
    for index in range(2):
        asked.add(index, patches)
    asked.answer(max_tokens=min(2, question.max_tokens))  # the programs are those of longer answers


class Answering:
    """Asks a question of a stream when it is time, and tells and writes the answers; use it with `with`.

    At the end of the block it asks once more, unless about the last frame it has: also where the source broke off.

    Args:
        question: what is asked.
        output: the folder, which exists when the first answer comes.
        say: tells a line.

    Attributes:
        last: the answer at the end of the block; None where the last result has it.
    """

    def __init__(self, question: Question, output: Path, say: Callable[[str], None]):
        self._question, self._stream, self._say = question, AskedStream(question), say
        self._path, self._aside = output / ANSWERS, output / f"{ANSWERS}.tmp"
        self._file: TextIO | None = None
        self._pending: Result | None = None  # the latest result, not asked about
        self._asked, self._seconds, self._longest = 0, 0.0, 0.0
        self._latest: Answer | None = None
        self.last: Answer | None = None

    def add(self, result: Result) -> Result:
        """The result of the next frame, with an answer where it is time. Raises LiveError for a broken decoder."""
        self._stream.add(result.index, result.patches)
        if not self._question.every or (result.index + 1) % self._question.every:
            self._pending = result
            return result
        self._pending = None
        return dataclasses.replace(result, answer=self._ask(result))

    def _ask(self, result: Result) -> Answer:
        began = time.monotonic()
        text = self._stream.answer()
        seconds = time.monotonic() - began
        frame = {"index": result.index, "time": result.frame.time}
        answer = Answer(**frame, question=self._question.text, text=text, frames=self._stream.frames, seconds=seconds)
        self._asked, self._seconds, self._longest = (
            self._asked + 1,
            self._seconds + seconds,
            max(self._longest, seconds),
        )
        self._latest = answer
        self._say(f"answer after frame {answer.index}, {answer.time:.2f} s: {' '.join(text.split())}")
        self._write(answer)
        return answer

    def _write(self, answer: Answer) -> None:
        if self._file is None:
            self._file = self._aside.open("w", encoding="utf-8")
        self._file.write(json.dumps(answer.as_json(), ensure_ascii=False) + "\n")
        self._file.flush()  # so that it can be followed, and is there if the machine stops

    @property
    def files(self) -> list[str]:
        """What is in the folder in the end, by name."""
        return [ANSWERS] if self._asked else []

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the answers; null where there was none."""
        return {
            "question": self._question.text,
            "answers": self._asked,
            "last": None if self._latest is None else self._latest.as_json(),
            "seconds": {
                "mean": self._seconds / self._asked if self._asked else None,
                "max": self._longest if self._asked else None,
            },
        }

    def __str__(self) -> str:
        """How many answers, and how long they took, in a line."""
        if not self._asked:
            return "answers            none"
        return (
            f"answers            {self._asked:,}, mean {self._seconds / self._asked:.2f} s, max {self._longest:.2f} s"
        )

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if self._pending is not None and (kind is None or issubclass(kind, DataError)):
                self.last = self._ask(self._pending)
        finally:
            if self._file is not None:
                self._file.close()
                self._aside.replace(self._path)
