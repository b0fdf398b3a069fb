"""Posed and captioned sources that need no files but pictures, some of their records damaged on purpose."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from world_cases import room

from omnistream_jax.data.errors import because
from omnistream_jax.data.images import read_image
from omnistream_jax.data.schema import CaptionedImage, PosedFrame, SequenceInfo

HEIGHT, WIDTH = 24, 32


@functools.cache
def small_room():
    return room(frames=8, height=HEIGHT, width=WIDTH, focal=25.0)


def posed_frames(world) -> list[PosedFrame]:
    """A world's frames as a source would give them."""
    everywhere = np.ones(world.depth.shape[1:], bool)
    return [
        PosedFrame(
            image=image,
            intrinsics=world.intrinsics.astype(np.float32),
            depth=depth.astype(np.float32),
            valid=everywhere,
            sky=None,
            cam_to_world=pose.astype(np.float32),
            path=f"frame {number}",
        )
        for number, (image, depth, pose) in enumerate(zip(world.frames, world.depth, world.cam_to_world, strict=True))
    ]


def truncated_jpeg(path: Path) -> str:
    """Writes the first half of a JPEG file."""
    Image.fromarray(small_room().frames[0]).resize((256, 192)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


@dataclasses.dataclass(frozen=True)
class FakePosed:
    """Sequences of the same room. `faults`: index -> "pose", "focal", "depth", or the path of a damaged image."""

    name: str
    count: int
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    ordered: bool = True
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of every frame

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return f"{self.name}/{index}"

    def info(self, index: int) -> SequenceInfo:
        return SequenceInfo(metric=self.ordered, dynamic=not self.ordered, ordered=self.ordered)

    def frame_count(self, index: int) -> int:
        return len(small_room().frames)

    def neighbours(self, index: int, frame: int) -> Sequence[int] | None:
        others = sorted(range(self.frame_count(index)), key=lambda other: abs(other - frame))
        return None if self.ordered else others[1:4]

    def read(self, index: int, frames: Sequence[int]) -> list[PosedFrame]:
        fault = self.faults.get(index)
        found = posed_frames(small_room())
        found = [dataclasses.replace(found[frame], **self.changes) for frame in frames]
        if fault is None:
            return found
        last = found[-1]
        if fault == "pose":
            changes = {"cam_to_world": np.full((4, 4), np.nan, np.float32)}
        elif fault == "focal":
            changes = {"intrinsics": last.intrinsics * np.float32([[-1, 1, 1], [1, 1, 1], [1, 1, 1]])}
        elif fault == "depth":
            nothing = {"depth": np.zeros_like(last.depth), "valid": np.zeros_like(last.valid)}
            return [dataclasses.replace(each, **nothing) for each in found]
        else:
            with because("image cannot be decoded"):
                changes = {"image": read_image(fault)}
        return [*found[:-1], dataclasses.replace(last, **changes)]


@dataclasses.dataclass(frozen=True)
class FakeCaptions:
    """One caption an index. `faults`: index -> "text", or the path of a damaged image; `answers`: not `answer`."""

    name: str
    count: int
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    instruction: str = "describe"
    answer: str = "a room"
    answers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    others: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return f"{self.name}/{index}"

    def read(self, index: int) -> CaptionedImage:
        fault, answer, image = (
            self.faults.get(index),
            self.answers.get(index, self.answer),
            small_room().frames[index % 8],
        )
        if fault == "text":
            answer = " \n"
        elif fault is not None:
            with because("image cannot be decoded"):
                image = read_image(fault)
        path = f"{self.describe(index)}.jpg"
        return CaptionedImage(image, self.instruction, answer, np.zeros((0, 4), np.float32), (), path, self.others)


WORDS = ("[UNK]", "user", "assistant", "describe", "a", "room", "red", "chair", "in", "the", "corner", ",", "(", ")")
CONTROL = ("<|im_start|>", "<|im_end|>", "<|box_start|>", "<|box_end|>", "<think>", "</think>")


def write_tokenizer(path: Path, control=CONTROL) -> str:
    """A tokenizer of whole words: WORDS are 0 to 13, a line break 14, digits 15 to 24, CONTROL 25 to 30."""
    words = [*WORDS, "\n", *"0123456789"]
    added = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    split = {"type": "Split", "invert": False}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(words) + i, "content": token, **added} for i, token in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**split, "pattern": {"Regex": r"[\n,()0-9]"}, "behavior": "Isolated"},
                {**split, "pattern": {"String": " "}, "behavior": "Removed"},
            ],
        },
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"},
    }
    path.write_text(json.dumps(description))
    return str(path)
