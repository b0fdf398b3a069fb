"""Captioned images: what the picture and the tokens are, checked against hand-typed tokens and a drawn box."""

import dataclasses
import re

import numpy as np
import pytest
from source_cases import FakeCaptions, write_tokenizer

from omnistream_jax.data.captions import CaptionData, check_text, letterbox, move_boxes
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.schema import CaptionedImage

START, END, BOX, BOX_END = 25, 26, 27, 28
PROMPT = [START, 1, 14, 3, END, 14, START, 2, 14]  # <|im_start|>user\ndescribe<|im_end|>\n<|im_start|>assistant\n


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def _data(tokenizer, batch=2, **changes) -> CaptionData:
    texts = {name: changes.pop(name) for name in ("instruction", "answer") if name in changes}
    options = {"tokenizer": tokenizer, "max_tokens": 16, "size": 48} | changes
    return CaptionData((FakeCaptions("captions", 10, **texts),), batch, **options)


def _step(data) -> dict:
    with build_pipeline({"caption": data}, seed=1, prefetch=0) as pipeline:
        return next(pipeline)["caption"]


def test_a_step_has_the_shapes_of_the_schema(tokenizer):
    batch = _step(_data(tokenizer))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((2, 1, 48, 48, 3), "uint8"),
        "tokens": ((2, 16), "int32"),
        "target_mask": ((2, 16), "bool"),
        "token_valid": ((2, 16), "bool"),
        "cut": ((2,), "bool"),
        "record": ((2,), "int64"),
    }


def test_a_caption_is_two_turns_of_which_the_answer_is_learned(tokenizer):
    batch = _step(_data(tokenizer))
    for row in range(2):
        assert batch["tokens"][row].tolist() == [*PROMPT, 4, 5, END, 0, 0, 0, 0]
        assert batch["target_mask"][row].tolist() == [False] * 9 + [True] * 3 + [False] * 4
        assert batch["token_valid"][row].tolist() == [True] * 12 + [False] * 4
    assert not batch["cut"].any()


def test_a_long_answer_is_cut_at_a_token_and_still_ends(tokenizer):
    batch = _step(_data(tokenizer, answer="a red chair in the corner", max_tokens=14))
    assert batch["tokens"][0].tolist() == [*PROMPT, 4, 6, 7, 8, END]
    assert batch["target_mask"][0].tolist() == [False] * 9 + [True] * 5
    assert batch["cut"].all()
    assert not _step(_data(tokenizer, answer="a red chair in the corner"))["cut"].any()


def test_an_answer_is_not_cut_within_a_box(tokenizer):
    whole = "a chair<|box_start|>(0,0),(4,9)<|box_end|>"
    answer = whole + " in the corner<|box_start|>(1,2),(3,4)<|box_end|>"
    # The square is 32 wide and 24 high of 32: 9.5 down becomes 7.125, 7 when written.
    box = [BOX, 12, 15, 11, 15, 13, 11, 12, 19, 11, 22, 13, BOX_END]
    for max_tokens, words in ((25, []), (26, [8]), (30, [8, 9, 10]), (40, [8, 9, 10])):
        batch = _step(_data(tokenizer, answer=answer, max_tokens=max_tokens))
        tokens = batch["tokens"][0][batch["token_valid"][0]].tolist()
        assert tokens == [*PROMPT, 4, 7, *box, *words, END]
        assert batch["cut"].all()
    assert not _step(_data(tokenizer, answer=answer, max_tokens=41))["cut"].any()


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer):
    message = r"source captions: none of its 10 records .*10 tokens leave no room"
    with pytest.raises(DataError, match=message) as caught:
        _step(_data(tokenizer, max_tokens=10))
    assert caught.value.reason == "no room for an answer"


@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 30), (45, 45), (200, 40)])
def test_a_picture_keeps_its_proportions_and_the_box_in_the_text_its_place(height, width):
    image = np.full((height, width, 3), 255, np.uint8)
    image[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = (255, 0, 0)
    corners = width // 3 / width, height // 3 / height, 2 * width // 3 / width, 2 * height // 3 / height
    numbers = [round(999 * share) for share in corners]
    text = "the <|box_start|>({},{}),({},{})<|box_end|> chair".format(*numbers)
    square, shown = letterbox(image, 90)
    assert square.shape == (90, 90, 3)
    assert (square[-1, -1] == (124, 116, 104)).all() or height == width
    white_or_red = (square[..., 0] > 240).sum() / 90**2
    assert white_or_red == pytest.approx(height * width / max(height, width) ** 2, rel=0.02)
    red = (square[..., 0] > 200) & (square[..., 1] < 128)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 90
    moved = np.array([int(number) for number in re.findall(r"\d+", move_boxes(text, shown))]) / 999
    np.testing.assert_allclose(moved, seen, atol=1.01 / 90)


def test_hand_typed_boxes_move():
    text = "<|box_start|>(0,0),(999,999)<|box_end|> and <|box_start|>(100,200),(500,600)<|box_end|>"
    expected = "<|box_start|>(0,0),(999,499)<|box_end|> and <|box_start|>(100,100),(500,300)<|box_end|>"
    assert move_boxes(text, (1.0, 0.5)) == expected
    assert move_boxes("no box (1,2),(3,4)", (0.5, 1.0)) == "no box (1,2),(3,4)"
    for broken in ("<|box_start|>(1,2)<|box_end|>", "<|box_start|>(1,2),(3,4)", "(1,2),(3,4)<|box_end|>"):
        with pytest.raises(DataError, match="a box is not written as"):
            move_boxes(broken, (1.0, 1.0))


def test_text_that_is_none_or_fakes_a_turn_is_refused():
    sample = CaptionedImage(np.zeros((2, 2, 3), np.uint8), "ask", "say", np.zeros((0, 4)), (), "x.jpg")
    check_text(sample)
    check_text(dataclasses.replace(sample, answer="<|object_ref_start|>it<|object_ref_end|><|box_start|>"))
    with pytest.raises(DataError, match=r"x.jpg: its caption has no text") as caught:
        check_text(dataclasses.replace(sample, answer=" \n\t"))
    assert caught.value.reason == "caption has no text"
    for field in ("instruction", "answer"):
        with pytest.raises(DataError, match=r"x.jpg: its text holds <\|im_end\|>"):
            check_text(dataclasses.replace(sample, **{field: "me<|im_end|>"}))


def test_the_vocabulary_holds_the_control_tokens(tokenizer):
    assert _data(tokenizer).vocabulary_size == 29


def test_settings_that_do_not_fit_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="tokenizer: there is no file"):
        _data(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer: .*text.json is no tokenizer's JSON file"):
        _data(str(tmp_path / "text.json"))
    with pytest.raises(DataError, match=r"bare.json has no token <\|im_start\|>"):
        _data(write_tokenizer(tmp_path / "bare.json", control=()))
    with pytest.raises(DataError, match="max_tokens: 0, expected 1 or more"):
        _data(tokenizer, max_tokens=0)
    with pytest.raises(DataError, match="size: 0, expected 1 or more"):
        _data(tokenizer, size=0)
