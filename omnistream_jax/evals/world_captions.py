"""Captions, boxes and answers about held-out pictures of the embedded world, and the same of the wrong pictures.

A caption of the world (data/world/language.py) reads

    Three things: a red ball, a cube covered in stars and a red slab. The red ball is above the red slab. The red slab
    is the nearest.

and is scored by its attributes:

    count      the number in the first sentence                                          1
    shape      of each thing that is listed                                              1 for each thing
    look       of each thing that is listed: its colour or its material                  1 for each thing
    relation   how two things lie to each other; right where the boxes bear it out       1, where stated
    nearest    which thing is the nearest                                                1, where stated

The order of things means nothing: those listed are matched one to one with the true ones (Kuhn 1955) so that the most
shapes and looks agree, at a tie the most looks. A picture has as many attributes as the longer of the two captions
states: what is made up counts as wrong, as does what is left out. It scores right attributes / attributes, and all
pictures count alike. What does not parse states nothing; a caption of which nothing parses scores 0.

What needs no picture, on the 125 held-out descriptions at 64 pixels: the true caption of another scene scores 0.26, the
best of 60 captions of train, said of every picture, 0.31.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from omnistream_jax.data.boxes import parse_boxes
from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.data.world import WorldCaptions

Answer = Callable[[np.ndarray, list[str]], list[str]]
"""Pictures uint8 [B, S, S, 3] and B instructions -> B texts, each by its own picture and instruction alone."""
Box = Sequence[float]

_ENUMERATION = re.compile(r"^(\w+) things?(?:: ([^.]*))?(?:\.|$)")
_LISTED = re.compile(r"^an? (?:(?P<shape>\w+) covered in (?P<material>\w[\w ]*)|(?P<colour>\w+) (?P<other_shape>\w+))$")
_RELATION = re.compile(r"^the (.+?) is (to the left of|to the right of|above|below) the (.+)$")
_NEAREST = re.compile(r"^the (.+) is the nearest$")
# How data/world/language.py begins its questions; the first that fits.
_KINDS = {
    "How many": "count",
    "What colour": "colour",
    "What shape": "shape",
    "What is": "material",
    "Is there": "presence",
    "Which is nearer": "nearer",
    "Is the": "place",
}


@dataclasses.dataclass(frozen=True)
class Caption:
    """What a text states, in small letters.

    Attributes:
      count: the number word, or None.
      things: (shape, look) of each that is listed; None for a word that is not there.
      relations: (thing, word, other thing), by their full names.
      nearest: full names of what is called the nearest.
    """

    count: str | None
    things: tuple[tuple[str | None, str | None], ...]
    relations: tuple[tuple[str, str, str], ...]
    nearest: tuple[str, ...]


def world_captions(
    answer: Answer, captions: WorldCaptions, *, count: int | None = None, batch: int = 16
) -> dict[str, float]:
    """Scores of a model, and of the same model blind: with each picture replaced by another one of the same task.

    Args:
      answer: the model; every call gets `batch` pictures (the last one repeated where there are fewer). A pair of
        picture and instruction is answered once.
      captions: the pictures, rendered once, at their size.
      count: how many records of each task, the first ones; None: all.
      batch: pictures in a call.

    Returns:
      Shares from 0 to 1; each also of the blind model, as NAME_blind.
      attribute_accuracy: of descriptions, see above.
      count_accuracy, shape_accuracy, look_accuracy, relation_accuracy, nearest_accuracy: the same of one attribute
        alone, over the pictures for which either caption states it; not there where none does.
      thing_accuracy: things listed with the right shape and the right look, of the longer list.
      box_iou: mean intersection over union of the first box in the answer and the true one as text has it, in
        thousandths; 0 where there is none.
      answer_accuracy: questions answered word for word, but for case, spaces and a full stop.
      answer_accuracy_KIND: the same of one kind of question.

    Raises:
      ValueError: fewer than two records of a task, fewer than `count`, or an answer that is not a text for each.
    """
    scores: dict[str, float] = {}
    for task, score in (("describe", _score_captions), ("locate", _score_boxes), ("ask", _score_answers)):
        records = _records(captions, task, count)
        for suffix, texts in zip(("", "_blind"), _answers(answer, records, batch), strict=True):
            scores |= {f"{name}{suffix}": value for name, value in score(records, texts).items()}
    return scores


def parse_caption(text: str) -> Caption:
    """What a caption states. Sentences of no known form state nothing; other words in the list are a bare thing."""
    text = " ".join(text.casefold().split())
    found = _ENUMERATION.match(text)
    sentences = [sentence.strip() for sentence in text.split(".")]
    return Caption(
        count=found[1] if found else None,
        things=tuple(map(_listed, re.split(r", | and ", found[2]))) if found and found[2] else (),
        relations=tuple(match.groups() for match in map(_RELATION.match, sentences) if match),
        nearest=tuple(match[1] for match in map(_NEAREST.match, sentences) if match),
    )


def caption_attributes(text: str, truth: CaptionedImage) -> dict[str, tuple[float, int]]:
    """(right, all) of each attribute of a caption, as this module's docstring has them, and of whole things.

    Args:
      text: the caption to be scored.
      truth: a record of the task "describe".
    """
    said, true = parse_caption(text), parse_caption(truth.answer)
    shapes, looks = _matched(said.things, true.things)
    longer = max(len(said.things), len(true.things))
    boxes = {phrase.casefold(): box for phrase, box in zip(truth.phrases, truth.boxes, strict=True)}
    return {
        "count": (float(said.count == true.count), 1),
        "shape": (shapes, longer),
        "look": (looks, longer),
        "relation": (_share([_lies_so(boxes, *one) for one in said.relations]), int(_any(said, true, "relations"))),
        "nearest": (_share([one in true.nearest for one in said.nearest]), int(_any(said, true, "nearest"))),
        "thing": (float(len(set(said.things) & set(true.things))), longer),  # no two true ones are alike
    }


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where both are empty."""
    overlap = _area((*np.maximum(first[:2], second[:2]), *np.minimum(first[2:], second[2:])))
    union = _area(first) + _area(second) - overlap
    return overlap / union if union > 0 else 0.0


def question_kind(question: str) -> str:
    """Which kind of data/world/language.py:Question a question about a picture is."""
    return next(kind for start, kind in _KINDS.items() if question.startswith(start))


def _records(captions: WorldCaptions, task: str, count: int | None) -> list[CaptionedImage]:
    places = [index for index in range(len(captions)) if captions.task(index) == task]
    wanted = len(places) if count is None else count
    if wanted < 2 or wanted > len(places):  # one alone cannot get the picture of another
        raise ValueError(f"{captions.name}: {wanted} of {len(places)} records to {task}, expected 2 to {len(places)}")
    return [captions.read(index) for index in places[:wanted]]


def _answers(answer: Answer, records: list[CaptionedImage], batch: int) -> tuple[list[str], list[str]]:
    """The answers to all records, with their own pictures and with those of the next ones."""
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected 1 or more")
    sighted = [(place, record.instruction) for place, record in enumerate(records)]
    blind = [((place + 1) % len(records), record.instruction) for place, record in enumerate(records)]
    pairs, texts = list(dict.fromkeys(sighted + blind)), {}
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        whole = some + some[-1:] * (batch - len(some))
        told = answer(np.stack([records[place].image for place, _ in whole]), [question for _, question in whole])
        if len(told) != batch or not all(isinstance(text, str) for text in told):
            raise ValueError(f"the model gave {len(told)} answers to {batch} instructions, expected a text for each")
        texts |= zip(some, told[: len(some)], strict=True)
    return [texts[pair] for pair in sighted], [texts[pair] for pair in blind]


def _score_captions(records: list[CaptionedImage], texts: list[str]) -> dict[str, float]:
    rows = [caption_attributes(text, record) for record, text in zip(records, texts, strict=True)]
    whole = [[row[name] for name in row if name != "thing"] for row in rows]
    scores = {"attribute_accuracy": _mean([(sum(r for r, _ in row), sum(n for _, n in row)) for row in whole])}
    stated = [name for name in rows[0] if any(row[name][1] for row in rows)]
    return scores | {f"{name}_accuracy": _mean([row[name] for row in rows]) for name in stated}


def _score_boxes(records: list[CaptionedImage], texts: list[str]) -> dict[str, float]:
    overlaps = []
    for record, text in zip(records, texts, strict=True):
        said, true = parse_boxes(text), parse_boxes(record.answer)
        overlaps.append(box_iou(said[0].corners, true[0].corners) if said else 0.0)
    return {"box_iou": float(np.mean(overlaps))}


def _score_answers(records: list[CaptionedImage], texts: list[str]) -> dict[str, float]:
    kinds = np.array([question_kind(record.instruction) for record in records])
    right = np.array([_plain(text) == _plain(record.answer) for record, text in zip(records, texts, strict=True)])
    of_kinds = {f"answer_accuracy_{kind}": float(right[kinds == kind].mean()) for kind in np.unique(kinds)}
    return {"answer_accuracy": float(right.mean()), **of_kinds}


def _listed(words: str) -> tuple[str | None, str | None]:
    """(shape, look) of "a red ball" or "a cube covered in stars"; anything else is a thing without either."""
    if not (found := _LISTED.match(words.strip())):
        return None, None
    return found["shape"] or found["other_shape"], found["material"] or found["colour"]


def _matched(said: Sequence[tuple], true: Sequence[tuple]) -> tuple[float, float]:
    """How many shapes and how many looks agree under the best matching."""
    if not said or not true:
        return 0.0, 0.0
    alike = np.array([[(one[0] == other[0], one[1] == other[1]) for other in true] for one in said], float)
    # A look is worth a little more, too little to outweigh a shape: there are at most as many pairs as true things.
    rows, columns = linear_sum_assignment(alike @ [1.0, 1.0 + 0.5 / len(true)], maximize=True)
    shapes, looks = alike[rows, columns].sum(0).tolist()
    return shapes, looks


def _lies_so(boxes: Mapping[str, Box], first: str, word: str, second: str) -> bool:
    """Whether two things are in the picture and their boxes' centres lie as the word says."""
    if first not in boxes or second not in boxes:
        return False
    right, down = (sum(boxes[first][axis::2]) - sum(boxes[second][axis::2]) for axis in (0, 1))
    return {"to the left of": right < 0, "to the right of": right > 0, "above": down < 0, "below": down > 0}[word]


def _any(said: Caption, true: Caption, field: str) -> bool:
    return bool(getattr(said, field) or getattr(true, field))


def _share(right: Sequence[bool]) -> float:
    """Of several such sentences; none: 0."""
    return sum(right) / len(right) if right else 0.0


def _mean(rows: Sequence[tuple[float, int]]) -> float:
    """Of right / all, over the pictures that have any."""
    return float(np.mean([right / whole for right, whole in rows if whole]))


def _area(box: Box) -> float:
    return max(0.0, float(box[2] - box[0])) * max(0.0, float(box[3] - box[1]))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").strip()
