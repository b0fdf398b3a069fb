"""Scores of captions, boxes and answers about the embedded world: what is right by hand, and trivial models."""

import collections
import functools

import numpy as np
import pytest

from omnistream_jax.data.schema import CaptionedImage
from omnistream_jax.data.world import WorldCaptions
from omnistream_jax.data.world.clips import render_clip
from omnistream_jax.data.world.language import frame_questions
from omnistream_jax.evals.box_picture import box_picture, described_pictures
from omnistream_jax.evals.world_captions import (
    Caption,
    box_iou,
    caption_attributes,
    parse_caption,
    question_kind,
    world_captions,
)


class Rendered(WorldCaptions):
    """Rendered once for all tests."""

    def read(self, index):
        return rendered(index)


CAPTIONS = Rendered("heldout", length=160, size=32)
TRUTH = (
    "Three things: a red ball, a cube covered in palace walls and a red slab. "
    "The red ball is above the red slab. The red slab is the nearest."
)
PHRASES = ("red ball", "cube covered in palace walls", "red slab")
BOXES = [(0.1, 0.1, 0.3, 0.3), (0.6, 0.1, 0.9, 0.3), (0.1, 0.6, 0.3, 0.9)]


@functools.cache
def rendered(index: int) -> CaptionedImage:
    return WorldCaptions("heldout", length=160, size=32).read(index)


def records() -> list[CaptionedImage]:
    return [CAPTIONS.read(index) for index in range(len(CAPTIONS))]


def of_task(task: str) -> list[CaptionedImage]:
    return [record for index, record in enumerate(records()) if CAPTIONS.task(index) == task]


def truth() -> CaptionedImage:
    return CaptionedImage(np.zeros((8, 8, 3), np.uint8), "", TRUTH, np.array(BOXES, np.float32), PHRASES, "")


def oracle(pictures: np.ndarray, instructions: list[str]) -> list[str]:
    """Knows every picture, and answers what was asked about it, whatever it is asked."""
    answers = {record.image.tobytes(): record.answer for record in records()}
    return [answers[picture.tobytes()] for picture in pictures]


def constant(text: str):
    return lambda pictures, instructions: [text] * len(instructions)


def commonplace() -> str:
    """The likeliest number of things, shapes by their shares, the likeliest look of each."""
    listed = [parse_caption(record.answer) for record in of_task("describe")]
    words = collections.Counter(caption.count for caption in listed).most_common(1)[0][0]
    number = ("no", "one", "two", "three", "four", "five", "six").index(words)
    things = collections.Counter(thing for caption in listed for thing in caption.things)
    shapes = [shape for shape, _ in collections.Counter(shape for shape, _ in things.elements()).most_common()]
    looks = collections.Counter(look for _, look in things.elements() if " " not in look and not look.endswith("s"))
    look = looks.most_common(1)[0][0]
    return f"{words} things: " + " and ".join(f"a {look} {shapes[i % len(shapes)]}" for i in range(number)) + "."


def test_a_perfect_model_scores_one_and_its_blind_twin_what_another_pictures_truth_earns():
    scores = world_captions(oracle, CAPTIONS, batch=16)
    sighted = {name: value for name, value in scores.items() if not name.endswith("_blind")}
    assert set(sighted.values()) == {1.0}
    assert {"attribute_accuracy", "box_iou", "answer_accuracy", "shape_accuracy", "look_accuracy"} <= set(sighted)
    assert 0.2 < scores["attribute_accuracy_blind"] < 0.45
    assert 0.0 < scores["box_iou_blind"] < 0.2
    assert scores["look_accuracy_blind"] < scores["shape_accuracy_blind"] < 0.8
    described = of_task("describe")
    rows = [
        caption_attributes(other.answer, one)
        for one, other in zip(described, described[1:] + described[:1], strict=True)
    ]
    assert scores["look_accuracy_blind"] == pytest.approx(np.mean([row["look"][0] / row["look"][1] for row in rows]))


def test_a_model_that_ignores_pictures_scores_as_its_blind_twin():
    def by_instruction(pictures, instructions):
        return [oracle_of[instruction] for instruction in instructions]

    oracle_of = {record.instruction: record.answer for record in records()}
    scores = world_captions(by_instruction, CAPTIONS)
    for name in [name for name in scores if not name.endswith("_blind")]:
        assert scores[name] == scores[f"{name}_blind"], name


def test_a_commonplace_and_a_list_of_everything_score_low():
    for text in (commonplace(), everything()):
        scores = world_captions(constant(text), CAPTIONS)
        assert 0 < scores["attribute_accuracy"] < 0.45, text
        assert scores["box_iou"] == scores["answer_accuracy"] == 0
    assert world_captions(constant(everything()), CAPTIONS)["attribute_accuracy"] < 0.1


def everything() -> str:
    names = sorted({phrase for record in of_task("describe") for phrase in record.phrases})
    return "six things: " + ", ".join(f"a {name}" for name in names) + "."


@pytest.mark.parametrize(
    "text", ["", "   ", "A picture of a room.", "things: red ball", "<|box_start|>(1,2)", "balls. " * 9]
)
def test_what_does_not_parse_scores_zero(text):
    assert parse_caption(text) == Caption(None, (), (), ())
    assert set(world_captions(constant(text), CAPTIONS, count=4).values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (
            TRUTH,
            {"count": (1, 1), "shape": (3, 3), "look": (3, 3), "relation": (1, 1), "nearest": (1, 1), "thing": (3, 3)},
        ),
        (TRUTH.upper().replace(" ", "  "), {"count": (1, 1), "shape": (3, 3), "look": (3, 3), "relation": (1, 1)}),
        # In another order, another relation that the boxes bear out, and nothing about the nearest.
        (
            "Three things: a red slab, a red ball and a cube covered in palace walls. "
            "The red ball is to the left of the cube covered in palace walls.",
            {"shape": (3, 3), "look": (3, 3), "relation": (1, 1), "nearest": (0, 1), "thing": (3, 3)},
        ),
        # Two looks are swapped: of those two things, either the shapes or the looks agree; the looks are preferred.
        (
            "Three things: a ball covered in palace walls, a red cube and a red slab. "
            "The red ball is below the red slab.",
            {"count": (1, 1), "shape": (1, 3), "look": (3, 3), "relation": (0, 1), "nearest": (0, 1), "thing": (1, 3)},
        ),
        # One thing left out, one made up, the count wrong; the nearest is another; a relation to what is not there.
        (
            "Two things: a red ball and a blue pillar. The blue pillar is above the red ball. "
            "The red ball is the nearest.",
            {"count": (0, 1), "shape": (1, 3), "look": (1, 3), "relation": (0, 1), "nearest": (0, 1), "thing": (1, 3)},
        ),
        # The same thing again and again earns its attributes once, but for what it shares with others.
        ("Six things: " + ", ".join(["a red ball"] * 6), {"shape": (1, 6), "look": (2, 6), "thing": (1, 6)}),
        # Cut short, in the middle of a name.
        ("Three things: a red ball, a cube covered", {"count": (1, 1), "shape": (1, 3), "look": (1, 3)}),
        # Of two relations one is right.
        (
            TRUTH.replace("is above the red slab.", "is above the red slab. The red ball is below the red slab."),
            {"relation": (0.5, 1), "shape": (3, 3)},
        ),
    ],
)
def test_attributes_by_hand(text, right):
    scored = caption_attributes(text, truth())
    assert {name: scored[name] for name in right} == right


def test_attribute_accuracy_of_a_picture_is_right_attributes_of_all():
    """(1 + 3 + 3 + 0 + 1) / (1 + 3 + 3 + 1 + 1) for each of two pictures."""

    class Two(WorldCaptions):
        def read(self, index):
            return truth() if self.task(index) == "describe" else super().read(index)

    text = TRUTH.replace("above", "below")
    scores = world_captions(constant(text), Two("heldout", length=8, size=16))
    assert scores["attribute_accuracy"] == pytest.approx(8 / 9)


def test_every_true_caption_parses_to_what_the_picture_shows():
    for record in of_task("describe"):
        names = {
            f"{look} {shape}" if f"{look} {shape}" in record.phrases else f"{shape} covered in {look}"
            for shape, look in parse_caption(record.answer).things
        }
        assert names == set(record.phrases)
        assert all(right == whole for right, whole in caption_attributes(record.answer, record).values())


def test_boxes_overlap_as_counted_in_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(rng.integers(0, 21, (2, 2, 2)), axis=1)  # box, corner, x or y
        masks = np.zeros((2, 20, 20), bool)
        for mask, ((x1, y1), (x2, y2)) in zip(masks, corners, strict=True):
            mask[y1:y2, x1:x2] = True
        expected = masks.all(0).sum() / max(masks.any(0).sum(), 1)
        assert box_iou(*(corners.reshape(2, 4) / 20)) == pytest.approx(expected, abs=1e-9)
    assert box_iou((0.0, 0.0, 0.2, 0.2), (0.1, 0.1, 0.3, 0.3)) == pytest.approx(1 / 7)
    assert box_iou((0.4, 0.4, 0.2, 0.2), (0.0, 0.0, 1.0, 1.0)) == 0  # inside out


def test_boxes_are_scored_by_the_first_one_in_the_answer():
    located = of_task("locate")

    def second(pictures, instructions):
        return [f"{'<|box_start|>(0,0),(1,1)<|box_end|>'}{text}" for text in oracle(pictures, instructions)]

    assert world_captions(second, CAPTIONS)["box_iou"] < 0.01
    whole = world_captions(constant("It is at <|box_start|>(0,0),(999,999)<|box_end|>."), CAPTIONS)["box_iou"]
    areas = [np.prod(record.boxes[0, 2:] - record.boxes[0, :2]) for record in located]
    assert whole == pytest.approx(np.mean(areas), abs=5e-3)  # the whole picture overlaps by the true box's share


def test_questions_are_known_by_their_kind():
    rng, kinds = np.random.default_rng(1), set()
    for index in range(12):
        for question in frame_questions(render_clip(CAPTIONS.scene(index), [0.5], 24), 0, rng):
            assert question_kind(question.question) == question.kind
            kinds.add(question.kind)
    assert kinds == {"count", "colour", "material", "shape", "presence", "nearer", "place"}


def test_answers_are_compared_but_for_case_spaces_and_full_stop():
    def shouted(pictures, instructions):
        return [f"  {text.upper()} . \n" for text in oracle(pictures, instructions)]

    assert world_captions(shouted, CAPTIONS)["answer_accuracy"] == 1
    assert world_captions(lambda *asked: [f"maybe {text}" for text in oracle(*asked)], CAPTIONS)["answer_accuracy"] == 0
    yes = world_captions(constant("yes"), CAPTIONS)
    asked = of_task("ask")
    assert yes["answer_accuracy"] == pytest.approx(np.mean([record.answer == "yes" for record in asked]))


def test_every_call_has_the_same_shape_and_no_pair_is_asked_twice():
    calls, asked = [], set()

    def answer(pictures, instructions):
        calls.append((pictures.shape, pictures.dtype, len(instructions)))
        asked.update((picture.tobytes(), text) for picture, text in zip(pictures, instructions, strict=True))
        return [""] * len(instructions)

    world_captions(answer, CAPTIONS, count=10, batch=8)
    expected = []
    for task in ("describe", "locate", "ask"):
        first = of_task(task)[:10]
        expected.append(
            {(first[(i + k) % 10].image.tobytes(), first[i].instruction) for i in range(10) for k in (0, 1)}
        )
    assert len(expected[0]) == 10  # all are asked the same: the blind answers are the others' own
    assert asked == set().union(*expected)
    assert calls == [((8, 32, 32, 3), np.dtype(np.uint8), 8)] * sum(-(-len(pairs) // 8) for pairs in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1}, "1 of 40 records to describe, expected 2 to 40"),
        ({"count": 41}, "41 of 40 records to describe"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        world_captions(oracle, CAPTIONS, **arguments)


@pytest.mark.parametrize("told", [["one"], [None] * 4, ["a"] * 5])
def test_answers_that_are_no_texts_are_refused(told):
    with pytest.raises(ValueError, match="expected a text for each"):
        world_captions(lambda pictures, instructions: told, CAPTIONS, count=4, batch=4)


def test_boxes_are_drawn_where_they_are_and_text_below():
    black = np.zeros((20, 40, 3), np.uint8)
    picture = box_picture(black, "Two things. " * 20, [(0.5, 0.5, 0.75, 1.2)], [(0.0, 0.0, 0.25, 0.5)], side=200)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 200
    image, words = picture[:100], picture[100:]
    for colour, (x1, y1, x2, y2) in (((213, 94, 0), (100, 50, 149, 99)), ((0, 158, 115), (0, 0, 49, 49))):
        rows, columns = np.nonzero((image == colour).all(-1))
        assert np.abs(np.array([columns.min(), rows.min(), columns.max(), rows.max()]) - [x1, y1, x2, y2]).max() <= 1
    assert (words[:, :3] == 255).all()
    assert (words[:, -3:] == 255).all()
    assert (words.min(-1) < 128).any()
    assert box_picture(black, "Two things.", [], side=200).shape[0] < picture.shape[0]
    with pytest.raises(ValueError, match="expected uint8"):
        box_picture(black[..., :1], "", [])


def test_described_pictures_show_the_models_box_beside_the_true_one():
    def says_box(pictures, instructions):
        return [
            "a caption" if "box" not in text else "<|box_start|>(0,0),(500,500)<|box_end|>" for text in instructions
        ]

    shown = described_pictures(says_box, CAPTIONS, count=2, side=100)
    assert shown.shape[1] > 200
    assert (shown == (213, 94, 0)).all(-1).sum() > 2 * 150
    assert (shown == (0, 158, 115)).all(-1).any()
    none = described_pictures(constant(""), CAPTIONS, count=2, side=100)
    assert not (none == (213, 94, 0)).all(-1).any()
    with pytest.raises(ValueError, match="41 pictures of 40"):
        described_pictures(says_box, CAPTIONS, count=41)
