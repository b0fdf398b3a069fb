"""Captioned images: what the picture and the rows of tokens are, by hand-typed tokens and a drawn box."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from source_cases import FakeCaptions, write_tokenizer

from omnistream_jax.data.boxes import move_boxes
from omnistream_jax.data.captions import CaptionData, check_text, letterbox
from omnistream_jax.data.chat import shares
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.schema import CaptionBatch, CaptionedImage

START, END, BOX, BOX_END, THINK, THINK_END = range(25, 31)
# <|im_start|>user\ndescribe<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n
PROMPT = [START, 1, 14, 3, END, 14, START, 2, 14, THINK, 14, 14, THINK_END, 14, 14]
BEFORE = len(PROMPT)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def _data(tokenizer, batch=2, **changes) -> CaptionData:
    texts = {name: changes.pop(name) for name in ("instruction", "answer", "answers", "others") if name in changes}
    options = {"tokenizer": tokenizer, "max_tokens": BEFORE + 7, "size": 48} | changes
    return CaptionData((FakeCaptions("captions", 10, **texts),), batch, **options)


def _step(data) -> dict:
    with build_pipeline({"caption": data}, seed=1, prefetch=0) as pipeline:
        return next(pipeline)["caption"]


@pytest.mark.parametrize("per_row", [1, 3])
def test_a_step_has_the_shapes_of_the_schema(tokenizer, per_row):
    batch = _step(_data(tokenizer, max_tokens=60, captions_per_row=per_row))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((2, per_row, 48, 48, 3), "uint8"),
        "tokens": ((2, 60), "int32"),
        "segment": ((2, 60), "int32"),
        "position": ((2, 60), "int32"),
        "target_mask": ((2, 60), "bool"),
        "cut": ((2, per_row), "bool"),
        "texts": ((2, per_row), "int32"),
        "record": ((2, per_row), "int64"),
    }
    assert set(batch) == set(CaptionBatch.__annotations__)


def test_a_caption_is_two_turns_of_which_the_answer_is_learned(tokenizer):
    batch = _step(_data(tokenizer))
    for row in range(2):
        assert batch["tokens"][row].tolist() == [*PROMPT, 4, 5, END, 0, 0, 0, 0]
        assert batch["target_mask"][row].tolist() == [False] * BEFORE + [True] * 3 + [False] * 4
        assert batch["segment"][row].tolist() == [101] * (BEFORE + 3) + [0] * 4
        assert batch["position"][row].tolist() == [*range(BEFORE + 3), 0, 0, 0, 0]
    assert not batch["cut"].any()


def test_a_long_answer_is_cut_at_a_token_and_still_ends(tokenizer):
    batch = _step(_data(tokenizer, answer="a red chair in the corner", max_tokens=BEFORE + 5))
    assert batch["tokens"][0].tolist() == [*PROMPT, 4, 6, 7, 8, END]
    assert batch["target_mask"][0].tolist() == [False] * BEFORE + [True] * 5
    assert batch["cut"].all()
    assert not _step(_data(tokenizer, answer="a red chair in the corner"))["cut"].any()


def test_an_answer_is_not_cut_within_a_box(tokenizer):
    whole = "a chair<|box_start|>(0,0),(4,9)<|box_end|>"
    answer = whole + " in the corner<|box_start|>(1,2),(3,4)<|box_end|>"
    # The square is 32 wide and 24 high of 32: 9.5 down becomes 7.125, 7 when written.
    box = [BOX, 12, 15, 11, 15, 13, 11, 12, 19, 11, 22, 13, BOX_END]
    for room, words in ((16, []), (17, [8]), (21, [8, 9, 10]), (31, [8, 9, 10])):
        batch = _step(_data(tokenizer, answer=answer, max_tokens=BEFORE + room))
        tokens = batch["tokens"][0][batch["segment"][0] > 0].tolist()
        assert tokens == [*PROMPT, 4, 7, *box, *words, END]
        assert batch["cut"].all()
    assert not _step(_data(tokenizer, answer=answer, max_tokens=BEFORE + 32))["cut"].any()


def test_several_captions_stand_in_a_row_in_the_order_of_their_images(tokenizer):
    answers = {index: " ".join(["red"] * (index + 1)) for index in range(10)}  # its number of words tells a record
    data = _data(tokenizer, answers=answers, max_tokens=3 * BEFORE + 40, captions_per_row=3)
    batch = _step(data)
    single = _step(_data(tokenizer, batch=6, answers=answers))
    np.testing.assert_array_equal(batch["record"].ravel(), single["record"].ravel())
    np.testing.assert_array_equal(batch["image"].reshape(6, 48, 48, 3), single["image"][:, 0])
    for row in range(2):
        texts = [[*PROMPT, *[6] * (int(record) + 1), END] for record in batch["record"][row]]
        length = sum(map(len, texts))
        assert batch["tokens"][row].tolist() == [*itertools.chain(*texts), *[0] * (3 * BEFORE + 40 - length)]
        places = [(100 * number + 1, place) for number, text in enumerate(texts, start=1) for place in range(len(text))]
        assert list(zip(batch["segment"][row, :length], batch["position"][row, :length], strict=True)) == places
        assert (batch["segment"][row, length:] == 0).all()
        learned = [[False] * BEFORE + [True] * (len(text) - BEFORE) for text in texts]
        assert batch["target_mask"][row, :length].tolist() == [*itertools.chain(*learned)]
        assert not batch["target_mask"][row, length:].any()
    assert not batch["cut"].any()
    assert data.describe(batch["record"]) == [f"captions/{record}" for record in batch["record"].ravel()]


def test_others_come_with_a_text_and_are_drawn_anew_in_every_pass(tokenizer):
    others = (("describe", "chair"), ("describe", "the corner"), ("describe", "red"))
    told = {(7,), (9, 10), (6,)}  # chair; the corner; red
    passes, room = {}, 2 * 3 * (BEFORE + 4)
    data = _data(tokenizer, others=others, texts_per_image=3, max_tokens=room, captions_per_row=2)
    with build_pipeline({"caption": data}, seed=1, prefetch=0) as pipeline:
        batches = [next(pipeline)["caption"] for _ in range(10)]  # 40 records: each of the 10 comes in four passes
    for batch, row, image in itertools.product(batches, range(2), (100, 200)):
        segment, learned = batch["segment"][row], batch["target_mask"][row]
        assert batch["texts"][row].tolist() == [3, 3]
        assert np.unique(segment[segment > 0]).tolist() == [101, 102, 103, 201, 202, 203]
        own, *drawn = (tuple(batch["tokens"][row][(segment == image + text) & learned]) for text in (1, 2, 3))
        assert own == (4, 5, END)
        assert drawn[0] != drawn[1]
        assert {answer[:-1] for answer in drawn} <= told
        passes.setdefault(int(batch["record"][row, image // 100 - 1]), []).append(tuple(drawn))
    assert [len(draws) for draws in passes.values()] == [4] * 10
    assert all(len(set(draws)) > 1 for draws in passes.values())  # 6 draws in order: 1 record in 216 draws one alone
    assert {draws[0][0][:-1] for draws in passes.values()} == told, "nor are they the same for all records of a pass"


def test_a_record_with_fewer_texts_gives_all_it_has(tokenizer):
    others = (("describe", "chair"), ("describe the red chair in the corner", "red"))
    data = _data(tokenizer, others=others, texts_per_image=4, max_tokens=4 * (BEFORE + 4))
    batch = _step(data)
    assert np.unique(batch["segment"]).tolist() == [0, 101, 102]  # nothing would be left of the other's answer
    assert batch["tokens"][0][(batch["segment"][0] == 102) & batch["target_mask"][0]].tolist() == [7, END]
    assert batch["texts"].tolist() == [[2], [2]]
    assert not batch["cut"].any()


def test_others_that_cannot_be_used_are_left_out_and_the_record_stays(tokenizer):
    bad = (("describe", " "), ("describe", "red<|im_end|>"), ("describe <think>", "red"), ("describe", "a<|box_end|>"))
    others = (*bad, ("describe", "chair"))
    room = {"max_tokens": 6 * (BEFORE + 4)}
    batch = _step(_data(tokenizer, others=others, texts_per_image=6, **room))
    assert batch["texts"].tolist() == [[2], [2]]
    assert batch["tokens"][0][(batch["segment"][0] == 102) & batch["target_mask"][0]].tolist() == [7, END]
    assert _step(_data(tokenizer, others=bad, **room))["texts"].tolist() == [[1], [1]]


def test_boxes_of_others_are_those_of_the_square(tokenizer):
    others = (("describe", "chair<|box_start|>(0,0),(4,9)<|box_end|>"),)
    batch = _step(_data(tokenizer, others=others, texts_per_image=2, max_tokens=2 * (BEFORE + 16)))
    # The square is 32 wide and 24 high of 32: 9.5 down becomes 7.125, 7 when written.
    box = [BOX, 12, 15, 11, 15, 13, 11, 12, 19, 11, 22, 13, BOX_END]
    told = batch["tokens"][0][(batch["segment"][0] == 102) & batch["target_mask"][0]].tolist()
    assert told == [7, *box, END]


def test_an_other_that_is_too_long_is_cut_and_told(tokenizer):
    data = {"others": (("describe", "a red chair in the corner"),), "texts_per_image": 2}
    batch = _step(_data(tokenizer, **data, max_tokens=2 * BEFORE + 3 + 5))
    answers = [batch["tokens"][0][(batch["segment"][0] == text) & batch["target_mask"][0]] for text in (101, 102)]
    assert [answer.tolist() for answer in answers] == [[4, 5, END], [4, 6, 7, 8, END]]
    assert batch["cut"].all()
    assert not _step(_data(tokenizer, **data, max_tokens=2 * BEFORE + 3 + 7))["cut"].any()


def test_only_the_longest_answers_of_a_row_are_cut(tokenizer):
    answers = {0: "red " * 30, 1: "a room", 2: "chair " * 20, 3: "corner"}
    data = CaptionData(
        (FakeCaptions("captions", 4, answers=answers),),
        1,
        tokenizer=tokenizer,
        max_tokens=4 * BEFORE + 25,
        captions_per_row=4,
        size=16,
    )
    batch = _step(data)
    kept = {}
    for number, record in enumerate(batch["record"][0].tolist(), start=1):
        mine = batch["tokens"][0][(batch["segment"][0] == 100 * number + 1) & batch["target_mask"][0]]
        assert mine[-1] == END
        kept[record] = len(mine) - 1
        assert batch["cut"][0, number - 1] == (record in (0, 2))
    # 25 tokens for answers and their ends: 3 + 2 are used, 20 are left for two.
    assert kept == {0: 9, 1: 2, 2: 9, 3: 1}
    assert (batch["segment"] > 0).all()


def test_what_is_left_goes_to_those_that_need_more():
    assert shares([5, 2, 9], 20) == [5, 2, 9]
    assert shares([5, 2, 9], 12) == [5, 2, 5]
    assert shares([9, 9, 9], 20) == [6, 7, 7]
    assert shares([8], 3) == [3]
    rng = np.random.default_rng(0)
    for _ in range(200):
        needed, total = rng.integers(1, 30, rng.integers(1, 6)), int(rng.integers(6, 80))
        given = np.array(shares(needed.tolist(), total))
        assert given.sum() == min(total, needed.sum())
        assert (given <= needed).all()
        short = given < needed
        assert given.max() - given[short].min(initial=given.max()) <= 1  # nobody has more than one who lacks
        assert (given >= np.minimum(needed, total // len(needed))).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_determined_by_the_step_and_hold_every_record_once_in_a_pass(tokenizer, workers):
    answers = {index: "red " * (index + 1) for index in range(10)}
    data = _data(tokenizer, batch=2, answers=answers, max_tokens=70, captions_per_row=3)  # 60 records in 10 steps
    with build_pipeline({"caption": data}, seed=4, prefetch=0) as pipeline:
        whole = [next(pipeline)["caption"] for _ in range(10)]
    records = np.concatenate([batch["record"].ravel() for batch in whole]).reshape(6, 10)
    assert (np.sort(records) == np.arange(10)).all()
    assert len({tuple(order) for order in records.tolist()}) > 1
    with build_pipeline({"caption": data}, seed=4, start_step=7, workers=workers) as pipeline:
        for expected in whole[7:]:
            again = next(pipeline)["caption"]
            for name, value in expected.items():
                np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_an_instruction_that_leaves_no_room_is_refused(tokenizer):
    message = rf"source captions: none of its 10 records .*{BEFORE + 1} tokens leave no room"
    for per_row in (1, 3):  # a record is refused for its row's share, whatever the others of the row need
        with pytest.raises(DataError, match=message) as caught:
            _step(_data(tokenizer, max_tokens=(BEFORE + 1) * per_row + per_row - 1, captions_per_row=per_row))
        assert caught.value.reason == "no room for an answer"
        _step(_data(tokenizer, max_tokens=(BEFORE + 2) * per_row, captions_per_row=per_row))


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


def test_text_that_is_none_or_fakes_a_turn_is_refused():
    sample = CaptionedImage(np.zeros((2, 2, 3), np.uint8), "ask", "say", np.zeros((0, 4)), (), "x.jpg")
    check_text(sample)
    thing = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    check_text(dataclasses.replace(sample, answer=thing))
    for field in ("instruction", "answer"):
        with pytest.raises(DataError, match=r"x.jpg: its text holds a box that is not written as one") as caught:
            check_text(dataclasses.replace(sample, **{field: thing.replace("(3,4)", "")}))
        assert caught.value.reason == "box is none"
    with pytest.raises(DataError, match=r"x.jpg: its caption has no text") as caught:
        check_text(dataclasses.replace(sample, answer=" \n\t"))
    assert caught.value.reason == "caption has no text"
    for field in ("instruction", "answer"):
        for token in ("<|im_end|>", "<think>", "</think>"):
            with pytest.raises(DataError, match=re.escape(f"x.jpg: its text holds {token}")):
                check_text(dataclasses.replace(sample, **{field: f"me{token}"}))


def test_the_vocabulary_holds_the_control_tokens(tokenizer):
    assert _data(tokenizer).vocabulary_size == 31


def test_settings_that_do_not_fit_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="tokenizer: there is no file"):
        _data(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer: .*text.json is no tokenizer's JSON file"):
        _data(str(tmp_path / "text.json"))
    with pytest.raises(DataError, match=r"bare.json has no token <\|im_start\|>"):
        _data(write_tokenizer(tmp_path / "bare.json", control=()))
    with pytest.raises(DataError, match=r"bare.json has no token <think>"):
        _data(write_tokenizer(tmp_path / "bare.json", control=("<|im_start|>", "<|im_end|>")))
    for per_row in (0, 61):
        with pytest.raises(DataError, match=rf"captions_per_row: {per_row}, expected 1 to max_tokens \(60\)"):
            _data(tokenizer, max_tokens=60, captions_per_row=per_row)
    for texts, most, sizes in (
        (0, 22, {}),
        (100, 99, {"max_tokens": 400}),
        (8, 7, {"max_tokens": 60, "captions_per_row": 8}),
    ):
        with pytest.raises(DataError, match=rf"texts_per_image: {texts}, expected 1 to {most} \(less than 100"):
            _data(tokenizer, texts_per_image=texts, **sizes)
        _data(tokenizer, texts_per_image=most, **sizes)
    with pytest.raises(DataError, match="max_tokens: 0, expected 1 or more"):
        _data(tokenizer, max_tokens=0)
    with pytest.raises(DataError, match="size: 0, expected 1 or more"):
        _data(tokenizer, size=0)
