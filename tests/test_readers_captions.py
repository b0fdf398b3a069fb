"""GRIT, BLIP3-OCR and SA-1B's captions: written as published and read back; malformed rows are named."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tar_cases import photograph, write_shard, write_tar

from omnistream_jax.data.captions import check_text
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers import captions, tables
from omnistream_jax.data.readers.blip3_ocr import open_blip3_ocr, read_pieces
from omnistream_jax.data.readers.grit import open_grit
from omnistream_jax.data.readers.sa1b import CAPTIONS_FILE, open_sa1b_caption

CAPTION = "a woman in an orange suit beside a flag"
BOXES = [[0.25, 0.125, 0.75, 0.875], [0.0, 0.0, 0.2, 0.9]]
SPANS = [[0, 7, *BOXES[0], 0.98], [33, 39, *BOXES[1], 0.71]]
EXPRESSIONS = [[0, 25, *BOXES[0], 0.98], [33, 39, *BOXES[1], 0.71]]
LONG = (
    "<|object_ref_start|>a woman in an orange suit<|object_ref_end|><|box_start|>(250,125),(750,875)<|box_end|> beside "
    "<|object_ref_start|>a flag<|object_ref_end|><|box_start|>(0,0),(200,900)<|box_end|>"
)
SHORT = LONG.replace("a woman in an orange suit<|object_ref_end|>", "a woman<|object_ref_end|>").replace(
    "<|box_end|> beside", "<|box_end|> in an orange suit beside"
)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0.1, 0.5, 0.9), "expected x1 < x2, y1 < y2"),
        ((0.6, 0.1, 0.5, 0.9), "expected x1 < x2, y1 < y2"),
        ((0.1, 0.9, 0.5, 0.2), "expected x1 < x2, y1 < y2"),
        ((-0.1, 0.1, 0.5, 0.9), "expected shares 0 to 1"),
        ((0.1, 0.1, 0.5, 45.0), "expected shares 0 to 1"),
        ((-0.01, 0.1, 0.0, 0.9), "lies beside the image"),
        ((float("nan"), 0.1, 0.5, 0.9), "expected four numbers"),
        ((0.1, 0.5, 0.9), "expected four numbers"),
        ("box", "expected four numbers"),
        (None, "expected four numbers"),
    ],
)
def test_boxes_that_are_none_are_refused(box, message):
    with pytest.raises(DataError, match=rf"row 7: a box .*{message}"):
        captions.check_box(box, "row 7")


def test_a_box_just_outside_is_cut_at_the_border():
    np.testing.assert_allclose(captions.check_box((-0.01, 0.5, 0.5, 1.015), "x"), [0, 0.5, 0.5, 1])


def test_grounded_captions():
    two = captions.grounded_prompt("two dogs", [(0, 8, BOXES[0]), (0, 8, BOXES[1])], "x")
    assert two.answer.count("<|box_start|>") == 2
    assert two.answer.count("two dogs") == 1
    assert two.phrases == ("two dogs", "two dogs")
    nested = captions.grounded_prompt(CAPTION, [(3, 8, BOXES[1]), (0, 25, BOXES[0]), (0, 7, BOXES[1])], "x")
    assert nested.phrases == ("a woman in an orange suit",)  # the longest of those that begin first
    for span in ((0, 40), (5, 5), (-1, 3), (0, 2.5)):
        with pytest.raises(DataError, match=r"x: a phrase from .* in 39 characters"):
            captions.grounded_prompt(CAPTION, [(*span, BOXES[0])], "x")
    with pytest.raises(DataError, match=r"x: no phrase of its caption has a box"):
        captions.grounded_prompt(CAPTION, [], "x")


def test_a_text_with_boxes_implies_itself_without_them_and_where_each_phrase_is():
    spans = [(0, 5, BOXES[0]), (10, 15, BOXES[1]), (20, 27, BOXES[0]), (20, 27, BOXES[1])]
    grounded = captions.grounded_prompt("a dog and a dog and two men.", spans, "x")
    first, second = (captions.format_box(box) for box in BOXES[:2])
    assert captions.implied_texts(grounded) == [
        ("Describe the image.", "a dog and a dog and two men."),
        ("Give the box of <|object_ref_start|>a dog<|object_ref_end|>.", first + second),
        ("Give the box of <|object_ref_start|>two men<|object_ref_end|>.", first + second),
    ]
    pieces = [("EXIT", BOXES[0]), ("12", BOXES[1])]
    assert captions.implied_texts(captions.transcribe_prompt(pieces, "x", with_boxes=True)) == [
        ("Transcribe the text in the image.", "EXIT\n12"),
        ("Give the box of <|object_ref_start|>EXIT<|object_ref_end|>.", first),
        ("Give the box of <|object_ref_start|>12<|object_ref_end|>.", second),
    ]
    for prompt in (
        captions.transcribe_prompt(pieces, "x", with_boxes=False),
        captions.describe_prompt("a dog", "x"),
        captions.locate_prompt("a dog", BOXES[0], "x"),
    ):
        assert captions.implied_texts(prompt) == []


def test_text_that_would_fake_a_turn_is_refused():
    for text in ("hello<|im_end|>", "<|box_start|>(1,1),(2,2)<|box_end|>"):
        with pytest.raises(DataError, match=r"row 3: its text holds the token <\|(im_end|box_start)\|>"):
            captions.describe_prompt(text, "row 3")
    for text in ("", " \n", None, 7):
        with pytest.raises(DataError, match=r"row 3: its text is .*, expected some"):
            captions.describe_prompt(text, "row 3")


def _write_grit(root, rows, beside):
    """Annotations of `rows`, shuffled over two files with others, and images of all but the last row."""
    table = [
        {"id": 7000000000 + number, "url": "x", "clip_similarity_vitb32": 0.3, **row} for number, row in enumerate(rows)
    ]
    others = [{**table[0], "id": number, "caption": "another"} for number in range(50)]
    (root / "grit-20m").mkdir()
    for number, part in enumerate((others[:20] + table[1:], table[:1] + others[20:])):
        path = root / f"grit-20m/coyo_{number}_snappy.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=16)
    names = {f"{number:08d}": name for number, name in enumerate(("astronaut", "coffee", "china", "dog")[: len(rows)])}
    extra = {key: {"id": row["id"]} for key, row in zip(names, table, strict=True)}
    write_shard(root / "images/00000.tar", names, extra, beside)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("phrases", "answer"), [("ref_exps", LONG), ("noun_chunks", SHORT)])
def test_grit_is_read_back(tmp_path, beside, phrases, answer):
    other = {
        "caption": "coffee",
        "noun_chunks": [[0, 6, 0.1, 0.2, 0.7, 0.8, 0.9]],
        "ref_exps": [[0, 6, 0.1, 0.2, 0.7, 0.8, 0.9]],
    }
    _write_grit(tmp_path, [{"caption": CAPTION, "noun_chunks": SPANS, "ref_exps": EXPRESSIONS}, other], beside)
    source = pickle.loads(pickle.dumps(open_grit(tmp_path, phrases=phrases)))
    assert len(source) == 2
    samples = {sample.path: sample for sample in map(source.read, range(2))}
    sample = samples[f"{tmp_path}/images/00000.tar:00000000"]
    assert sample.instruction == "Describe the image and give the boxes of what you name."
    assert sample.answer == answer
    np.testing.assert_allclose(sample.boxes, BOXES)
    assert sample.image.shape == (256, 256, 3)
    check_text(sample)
    coffee = samples[f"{tmp_path}/images/00000.tar:00000001"]
    assert coffee.image.shape == (256, 384, 3)
    assert coffee.answer.endswith("<|box_start|>(100,200),(700,800)<|box_end|>")  # typed by hand


def test_grit_is_read_from_the_json_in_its_tars(tmp_path):
    rows = {
        "00000000": {"caption": CAPTION, "ref_exps": EXPRESSIONS},
        "00000001": {"caption": CAPTION, "ref_exps": json.dumps(EXPRESSIONS)},
        "00000002": {"caption": CAPTION, "ref_exps": ["none"]},
        "00000003": {"caption": " ", "ref_exps": EXPRESSIONS},
    }
    names = dict(zip(rows, ("astronaut", "coffee", "china", "dog"), strict=True))
    write_shard(tmp_path / "images/00000.tar", names, rows)
    source = open_grit(tmp_path)
    assert [source.read(index).answer for index in (0, 1)] == [LONG, LONG]
    for index, message in ((2, "its ref_exps is .*, expected a list"), (3, "its text is ' '")):
        with pytest.raises(DataError, match=rf"00000.tar:0000000{index}: {message}"):
            source.read(index)


def test_malformed_rows_of_grit_are_named(tmp_path):
    rows = [
        {"caption": CAPTION, "ref_exps": [[0, 7, 0.7, 0.1, 0.2, 0.9, 0.5]]},
        {"caption": "", "ref_exps": EXPRESSIONS},
        {"caption": CAPTION, "ref_exps": [[0, 7, 0.1, 0.1, 1.7, 0.9, 0.5]]},
    ]
    _write_grit(tmp_path, rows, beside=True)
    source = open_grit(tmp_path)
    expected = {
        "00000000": r"coyo_1_snappy.parquet, row 0: a box",
        "00000001": r"coyo_0_snappy.parquet, row 20: its text",
        "00000002": r"coyo_0_snappy.parquet, row 21: a box is .*shares 0 to 1",
    }
    assert len(source) == 3
    for index in range(3):
        with pytest.raises(DataError, match=expected[source.describe(index)[-8:]]) as caught:
            source.read(index)
        assert caught.value.reason in ("box is none", "box outside", "caption has no text")


def test_another_layout_is_no_grit(tmp_path):
    with pytest.raises(DataError, match=r"images: there is no .* expected img2dataset's folder of tars"):
        open_grit(tmp_path)
    write_shard(tmp_path / "images/00000.tar", {"00000000": "dog"})
    with pytest.raises(DataError, match=r"00000.tar:00000000: its JSON has no 'ref_exps', and no Parquet"):
        open_grit(tmp_path)
    (tmp_path / "grit-20m").mkdir()
    with pytest.raises(DataError, match=r"holds no .parquet file; expected GRIT's coyo_0_snappy.parquet"):
        open_grit(tmp_path)
    path = tmp_path / "grit-20m/coyo_0_snappy.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "caption": ["x"]}), path)
    with pytest.raises(DataError, match=r"coyo_0_snappy.parquet: has no column 'ref_exps', only id, caption"):
        open_grit(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "caption": ["x"], "ref_exps": [[[0.0]]]}), path)
    with pytest.raises(DataError, match=r"its JSON has no 'id', and there is no Parquet .* --save_additional_columns"):
        open_grit(tmp_path)
    write_shard(tmp_path / "images/00000.tar", {"00000000": "dog"}, {"00000000": {"id": 2}})
    with pytest.raises(DataError, match=r"none of its 1 images has the id of a row in"):
        open_grit(tmp_path)
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"coyo_0_snappy.parquet: expected a Parquet file"):
        open_grit(tmp_path)


def test_row_groups_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [f"{n:01000d}" for n in range(100)]}), path, row_group_size=10)
    rows = tables.open_parquet([path], ["a"])
    monkeypatch.setattr(tables, "CACHE_BYTES", 25_000)
    cache = tables._RowGroups()
    monkeypatch.setattr(tables, "_CACHE", cache)
    for index in np.random.default_rng(0).permutation(100):
        assert rows.row(int(index)) == {"a": f"{index:01000d}"}
        assert len(cache._tables) <= 2
    assert rows.describe(57).endswith("x.parquet, row 57")


PIECES = (
    'The image contains the text "<ocr>MACK SHOP</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>", '
    'the text "<ocr>5 < 6</ocr><bbox>[-0.004, 0.5][0.25, 0.625]</bbox>"'
)


def _entries(text, plain=True):
    entries = [{"text": "raw", "granularity": 5, "include_datacomp_raw_cap": True}]
    entries += [
        {"text": f"level {level}", "granularity": level, "include_datacomp_raw_cap": False} for level in range(5)
    ]
    return json.dumps(
        [*entries, {"text": text, "granularity": 5, "include_datacomp_raw_cap": False}] if plain else entries
    )


def _write_blip3(root, texts):
    names = ("astronaut", "coffee", "china", "dog")[: len(texts)]
    uids = [f"{number:032x}" for number in range(len(texts))]
    table = pyarrow.table(
        {"uid": ["f" * 32, *uids], "url": ["x"] * (len(texts) + 1), "captions": [_entries("none"), *texts]}
    )
    pyarrow.parquet.write_table(table, root / "001.parquet")
    keys = {f"{number:09d}": name for number, name in enumerate(names)}
    extra = {key: {"uid": uid} for key, uid in zip(keys, uids, strict=True)}
    write_shard(root / "images/shards/00000000.tar", keys, extra, beside=True)


def test_blip3_ocr_is_read_back(tmp_path):
    _write_blip3(tmp_path, [_entries(PIECES)])
    sample = pickle.loads(pickle.dumps(open_blip3_ocr(tmp_path))).read(0)
    assert sample.instruction == "Transcribe the text in the image and give the box of each piece."
    assert sample.answer == (
        "<|object_ref_start|>MACK SHOP<|object_ref_end|><|box_start|>(192,37),(817,203)<|box_end|>\n"
        "<|object_ref_start|>5 < 6<|object_ref_end|><|box_start|>(0,500),(250,625)<|box_end|>"
    )
    np.testing.assert_allclose(sample.boxes, [[0.192, 0.037, 0.817, 0.203], [0, 0.5, 0.25, 0.625]], atol=1e-6)
    assert sample.image.shape == (256, 256, 3)
    check_text(sample)
    plain = open_blip3_ocr(tmp_path, with_boxes=False).read(0)
    assert (plain.instruction, plain.answer) == ("Transcribe the text in the image.", "MACK SHOP\n5 < 6")
    assert plain.boxes.shape == (0, 4)


def test_blip3_ocr_is_read_from_the_json_in_its_tars(tmp_path):
    write_shard(tmp_path / "images/00000.tar", {"00000000": "dog"}, {"00000000": {"captions": _entries(PIECES)}})
    sample = open_blip3_ocr(tmp_path, with_boxes=False).read(0)
    assert (sample.answer, sample.path) == ("MACK SHOP\n5 < 6", f"{tmp_path}/images/00000.tar:00000000")


def test_malformed_rows_of_blip3_ocr_are_named(tmp_path):
    texts = [
        "no JSON",
        _entries("", plain=False),
        _entries("no text here"),
        _entries("<ocr>X</ocr><bbox>[0.5, 0.1][0.4, 0.2]</bbox>"),
    ]
    _write_blip3(tmp_path, texts)
    source = open_blip3_ocr(tmp_path)
    messages = [
        "its captions hold no text of granularity 5",
        "its captions hold no text of granularity 5",
        "holds no text",
        "a box is",
    ]
    for index, message in enumerate(messages):
        with pytest.raises(DataError, match=rf"001.parquet, row {index + 1}: {message}"):
            source.read(index)
    with pytest.raises(DataError, match=r"x: expected <ocr>TEXT</ocr><bbox>"):
        read_pieces(_entries("<ocr>A</ocr><bbox>[0.1, 0.2]</bbox>"), "x")


def test_another_layout_is_no_blip3_ocr(tmp_path):
    with pytest.raises(DataError, match=r"images: there is no .* expected the folder of tars"):
        open_blip3_ocr(tmp_path)
    write_shard(tmp_path / "images/00000.tar", {"00000000": "dog"})
    with pytest.raises(DataError, match=r"00000.tar:00000000: its JSON has no 'captions', and no Parquet files"):
        open_blip3_ocr(tmp_path)
    _write_blip3(tmp_path, [_entries(PIECES)])
    pyarrow.parquet.write_table(pyarrow.table({"uid": ["e" * 32], "captions": ["x"]}), tmp_path / "001.parquet")
    with pytest.raises(DataError, match=r"none of its 1 images has the uid of a row in"):
        open_blip3_ocr(tmp_path)


def _line(image, *turns):
    turns = turns or ("<image>\nDescribe the image.", "A person in an orange suit.\n")
    roles = ("human", "gpt")
    return {"image": image, "conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]}


def _write_sa1b(root, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (root / CAPTIONS_FILE).write_text(text)
    masks = json.dumps({"annotations": []}).encode()
    members = {"./sa_1.jpg": photograph("astronaut"), "./sa_1.json": masks, "./sa_2.jpg": photograph("coffee")}
    write_tar(root / "images/sa_000020.tar", members)
    (root / "images/sa_000021").mkdir()
    (root / "images/sa_000021/sa_9.jpg").write_bytes(photograph("china"))


def test_sa1b_captions_are_read_back_from_tars_and_folders(tmp_path):
    lines = [_line("sa_000020/sa_2.jpg"), _line("sa_000021/sa_9.jpg", "q", "The sky."), _line("sa_000020/sa_1.jpg")]
    _write_sa1b(tmp_path, [*lines, _line("sa_000020/sa_3.jpg"), _line("sa_000099/sa_5.jpg")])
    source = pickle.loads(pickle.dumps(open_sa1b_caption(tmp_path)))
    assert (len(source), source.missing) == (3, 2)
    assert [source.read(index).image.shape[1] for index in range(3)] == [384, 384, 256]
    sample = source.read(1)
    assert (sample.instruction, sample.answer) == ("Describe the image.", "The sky.")
    np.testing.assert_array_equal(sample.image[10, 20], [181, 206, 236])
    assert source.read(0).answer == "A person in an orange suit."
    assert source.read(2).path == f"{tmp_path}/images/sa_000020.tar:sa_1"
    assert source.describe(1).endswith(f"{CAPTIONS_FILE}, line 2")


def test_malformed_lines_of_sa1b_captions_are_named(tmp_path):
    lines = [
        _line("sa_000020/sa_1.jpg"),
        "no JSON\n",
        _line(["sa_000020/sa_1.jpg", "sa_000020/sa_2.jpg"]),
        _line("../../etc/passwd"),
        _line("sa_000020/sa_1.jpg", "q", " "),
        _line("sa_000020/sa_1.jpg", "q"),
        {"image": "sa_000020/../../x.jpg", "x": {"image": "sa_000021/sa_9.jpg"}},
        _line("sa_000021/sa_77.jpg"),
    ]
    _write_sa1b(tmp_path, lines)
    source = open_sa1b_caption(tmp_path)
    assert len(source) == 8
    messages = {
        1: "expected a JSON object",
        2: "its image is .*expected sa_000020/sa_223750.jpg",
        3: "its image is .*expected sa_000020/sa_223750.jpg",
        4: "its text is ' '",
        5: "its conversations are",
        6: "its image is 'sa_000020/../../x.jpg'",
    }
    for index, message in messages.items():
        with pytest.raises(DataError, match=rf"line {index + 1}: {message}"):
            source.read(index)
    with pytest.raises(DataError, match=r"sa_000021/sa_77.jpg: there is no such image file"):
        source.read(7)


def test_another_layout_is_no_sa1b(tmp_path):
    with pytest.raises(DataError, match=rf"{CAPTIONS_FILE}: there is no .* expected the file of captions"):
        open_sa1b_caption(tmp_path)
    (tmp_path / CAPTIONS_FILE).write_text(json.dumps(_line("sa_000020/sa_1.jpg")) + "\n")
    with pytest.raises(DataError, match=r"images: there is no .* expected the folder of SA-1B's images"):
        open_sa1b_caption(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"holds no image that .* names; expected sa_000020.tar or sa_000020/"):
        open_sa1b_caption(tmp_path)


def test_a_damaged_picture_is_named(tmp_path):
    lines = [_line("sa_000020/sa_1.jpg")]
    _write_sa1b(tmp_path, lines)
    write_tar(tmp_path / "images/sa_000020.tar", {"sa_1.jpg": photograph("dog")[:5000]})
    with pytest.raises(DataError, match=r"sa_000020.tar:sa_1: expected a whole image file"):
        open_sa1b_caption(tmp_path).read(0)
