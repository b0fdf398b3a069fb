"""Boxes as text: hand-typed ones, ones written and read back, and what a decoder may say instead."""

import numpy as np
import pytest

from omnistream_jax.data.boxes import format_box, format_phrase, malformed_boxes, move_boxes, parse_boxes
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.world import WorldCaptions

REF, REF_END, BOX, BOX_END = "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"
RED = f"{REF}a red car{REF_END}{BOX}(112,250),(498,731){BOX_END}"
CORNERS = (0.1125, 0.2505, 0.4985, 0.7315)


def test_boxes_are_written_in_thousandths_rounded_down():
    boxes = {
        (0, 0, 1, 1): "(0,0),(999,999)",
        (0.1, 0.2, 0.7, 0.9995): "(100,200),(700,999)",
        (0.0019, 0, 0.5, 1): "(1,0),(500,999)",
    }
    for box, text in boxes.items():
        assert format_box(box) == format_box(np.array(box, np.float32)) == f"{BOX}{text}{BOX_END}"
    for box in ((0.1, 0.2, 0.3), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, 0, float("nan"), 1)):
        with pytest.raises(DataError, match="expected four shares from 0 to 1"):
            format_box(box)


def test_a_hand_typed_box_is_read():
    assert parse_boxes(RED) == [("a red car", CORNERS)]
    assert parse_boxes(f"It is {BOX}(112,250),(498,731){BOX_END}.") == [(None, CORNERS)]


def test_boxes_come_back_within_half_a_thousandth():
    rng = np.random.default_rng(0)
    low = rng.random((200, 2)) * 0.9
    boxes = np.concatenate([low, low + rng.random((200, 2)) * (1 - low)], axis=1).astype(np.float32)
    boxes[0] = 0, 0, 1, 1
    phrases = [None, "a chair", "a (big) chair, < 3 m", "un café\nnoir"]
    text = ""
    for number, pair in enumerate(boxes.reshape(100, 2, 4)):
        phrase = phrases[number % 4]
        text += "".join(map(format_box, pair)) if phrase is None else format_phrase(phrase, pair)
        text += " and "
    found = parse_boxes(text)
    assert [box.phrase for box in found] == [phrase for _ in range(25) for phrase in phrases for _ in range(2)]
    np.testing.assert_allclose([box.corners for box in found], boxes, atol=0.0005001)
    assert malformed_boxes(text) == 0


def test_the_worlds_boxes_come_back_from_its_answers():
    world, boxes = WorldCaptions("heldout", 24, size=32), 0
    for index in range(24):
        record = world.read(index)
        found = parse_boxes(record.answer)
        if world.task(index) == "ground":
            assert [box.phrase for box in found] == list(record.phrases)
        if world.task(index) in ("ground", "locate"):
            np.testing.assert_allclose([box.corners for box in found], record.boxes, atol=0.0005001)
            boxes += len(found)
        else:
            assert found == []
    assert boxes > 12


def test_a_phrase_belongs_to_the_boxes_right_after_it():
    box = f"{BOX}(1,2),(3,4){BOX_END}"
    for text, phrases in (
        (f"{REF}two dogs{REF_END}{box}{box}", ["two dogs", "two dogs"]),
        (f"{REF}a dog{REF_END} \n{box} {box}", ["a dog", "a dog"]),
        (f"{REF}a dog{REF_END} is at {box}", [None]),
        (f"{REF}a dog{REF_END}{REF}a cat{REF_END}{box}", ["a cat"]),
        (f"{REF}a dog{REF}a cat{REF_END}{box}", ["a cat"]),
        (f"{REF}a dog{box}", [None]),
        (f"a dog{REF_END}{box}", [None]),
        (f"{REF} {REF_END}{box}", [None]),
        (f"{REF}a dog{REF_END}{box}, {box}", ["a dog", None]),
    ):
        assert [found.phrase for found in parse_boxes(text)] == phrases, text


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        ("", 0),
        ("(112,250),(498,731)", 0),
        (f"{REF}a dog{REF_END}", 0),
        (f"{BOX}(112,250){BOX_END}", 1),
        (f"{BOX}(112,250),(498,1000){BOX_END}", 1),
        (f"{BOX}(-12,250),(498,731){BOX_END}", 1),
        (f"{BOX}(1.5,250),(498,731){BOX_END}", 1),
        (f"{BOX}(\u0661,250),(498,731){BOX_END}", 1),  # a digit, but none that is written here
        (f"{BOX}(112,250),(498,731)", 1),
        (f"(112,250),(498,731){BOX_END}", 1),
        (f"{BOX}{BOX}{BOX}", 3),
        (f"{BOX}a dog{BOX_END}{BOX}{BOX_END}", 2),
    ],
)
def test_what_is_no_box_is_skipped_and_counted(text, malformed):
    assert parse_boxes(text) == []
    assert malformed_boxes(text) == malformed
    assert parse_boxes(text + RED)[-1].corners == CORNERS  # and hides no other
    assert parse_boxes(RED + text) == [("a red car", CORNERS)]
    assert malformed_boxes(RED + text) == malformed


def test_corners_are_put_in_order():
    for corners in ("(498,731),(112,250)", "(498,250),(112,731)", "(112,731),(498,250)"):
        assert parse_boxes(f"{BOX}{corners}{BOX_END}") == [(None, CORNERS)]
    (flat,) = parse_boxes(f"{BOX}(7,9),(7,9){BOX_END}")
    assert flat.corners == (0.0075, 0.0095, 0.0075, 0.0095)


def test_hand_typed_boxes_move():
    text = "<|box_start|>(0,0),(999,999)<|box_end|> and <|box_start|>(100,200),(500,600)<|box_end|>"
    expected = "<|box_start|>(0,0),(999,499)<|box_end|> and <|box_start|>(100,100),(500,300)<|box_end|>"
    assert move_boxes(text, (1.0, 0.5)) == expected
    assert move_boxes("no box (1,2),(3,4)", (0.5, 1.0)) == "no box (1,2),(3,4)"
    for broken in ("<|box_start|>(1,2)<|box_end|>", "<|box_start|>(1,2),(3,4)", "(1,2),(3,4)<|box_end|>"):
        with pytest.raises(DataError, match="a box is not written as"):
            move_boxes(broken, (1.0, 1.0))
    assert move_boxes(RED, (1.0, 1.0)) == RED
