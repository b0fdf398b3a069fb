"""Prepared captions: pictures, texts and boxes as the readers of the published layouts give them."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from prepare_cases import contents, run
from source_cases import write_tokenizer
from tar_cases import photograph, write_shard, write_tar
from test_prepare_images import SMALL, skipped
from test_readers_captions import CAPTION, EXPRESSIONS, PIECES, _entries, _line, _write_sa1b
from test_readers_refcoco import BOXES, REFERENCES

from omnistream_jax.data.captions import CaptionData
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.picture_records import decode_caption, encode_caption
from omnistream_jax.data.readers.prepared import Prepared
from omnistream_jax.data.readers.prepared_captions import PreparedCaptions
from omnistream_jax.data.record_bytes import as_tensor, pack
from omnistream_jax.data.registry import open_dataset


def write_grit(root):
    rows = {"00000000": {"caption": CAPTION, "ref_exps": EXPRESSIONS}, "00000001": {"caption": "", "ref_exps": []}}
    write_shard(root / "images/00000.tar", {"00000000": "astronaut", "00000001": "coffee"}, rows)
    return {"caption has no text": 1}


def write_blip3_ocr(root):
    rows = {f"0000000{n}": {"captions": text} for n, text in enumerate((_entries(PIECES), _entries("none"), "no JSON"))}
    write_shard(root / "images/00000.tar", dict(zip(rows, ("dog", "china", "coffee"), strict=True)), rows)
    return {"captions cannot be read": 1, "caption has no text": 1}


def write_refcoco(which):
    def write(root):
        name, by = "COCO_train2014_000000581857.jpg", "umd" if which == "refcocog" else "unc"
        (root / which).mkdir(parents=True)
        boxes = [{"id": key, "image_id": 581857, "bbox": box} for key, box in BOXES.items()]
        image = {"id": 581857, "file_name": name, "width": 256, "height": 256}
        (root / which / "instances.json").write_text(json.dumps({"images": [image], "annotations": boxes}))
        (root / which / f"refs({by}).json").write_text(json.dumps(REFERENCES))
        (root / "train2014").mkdir()
        (root / "train2014" / name).write_bytes(photograph("astronaut"))
        gone = "its object N is not in instances.json"
        return {"caption has no text": 1, "box is none": 1, "box outside": 1, gone: 1}

    return write


def write_sa1b(root):
    root.mkdir()
    lines = [_line("sa_000020/sa_2.jpg"), _line("sa_000021/sa_9.jpg", "q", "The sky."), _line("sa_000020/sa_1.jpg")]
    _write_sa1b(root, [*lines, _line("sa_000021/sa_5.jpg")])
    return {"file is missing": 1}


WRITERS = {
    "grit": write_grit,
    "blip3_ocr": write_blip3_ocr,
    "refcoco": write_refcoco("refcoco"),
    "refcoco+": write_refcoco("refcoco+"),
    "refcocog": write_refcoco("refcocog"),
    "sa1b_caption": write_sa1b,
}


def usable(reader):
    found = []
    for index in range(len(reader)):
        try:
            found.append(reader.read(index))
        except DataError:
            continue
    return found


def assert_same_captions(prepared, expected, root):
    assert len(prepared) == len(expected) > 0
    for index, theirs in enumerate(expected):
        ours = prepared.read(index)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        assert (ours.boxes.dtype, ours.boxes.shape) == (np.float32, theirs.boxes.shape)
        assert (ours.instruction, ours.answer, ours.phrases) == (theirs.instruction, theirs.answer, theirs.phrases)
        assert ours.others == theirs.others
        assert ours.path == f"{prepared.describe(index)}: {theirs.path.removeprefix(f'{root}{os.sep}')}"


@pytest.mark.parametrize("dataset", WRITERS)
def test_captions_are_those_of_the_published_layout(dataset, tmp_path, capsys):
    root, output = tmp_path / "in", tmp_path / "out"
    faults = WRITERS[dataset](root)
    assert run(root, None, "--check", dataset=dataset) == 1
    assert f"records can be used, {sum(faults.values())} faults" in capsys.readouterr().out
    assert run(root, output, SMALL, dataset=dataset) == 0
    assert skipped(output) == faults
    prepared = pickle.loads(pickle.dumps(open_dataset("prepared_captions", output)))
    raw = open_dataset(dataset, root)
    assert prepared.name == raw.name
    assert_same_captions(prepared, usable(raw), root)
    published = {photograph(name) for name in ("astronaut", "coffee", "china", "dog")}
    assert all(prepared.record(index).picture in published for index in range(len(prepared)))


def test_a_caption_is_what_was_published(tmp_path):
    write_refcoco("refcoco")(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", dataset="refcoco") == 0
    prepared = PreparedCaptions.open(tmp_path / "out")
    record = prepared.record(0)
    assert record.name == "refcoco (train), ref_id 1, sentence 0"
    assert record.path == "train2014/COCO_train2014_000000581857.jpg"
    assert record.instruction == "Give the box of <|object_ref_start|>the woman in orange<|object_ref_end|>."
    assert record.answer == "<|box_start|>(250,125),(750,875)<|box_end|>"
    np.testing.assert_array_equal(record.boxes, [[0.25, 0.125, 0.75, 0.875]])


def test_boxes_stay_where_they_are_when_pictures_shrink(tmp_path):
    write_grit(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--short_side=100", dataset="grit") == 0
    ours, theirs = PreparedCaptions.open(tmp_path / "out").read(0), open_dataset("grit", tmp_path / "in").read(0)
    assert (ours.image.shape, theirs.image.shape) == ((100, 100, 3), (256, 256, 3))
    assert (ours.answer, ours.phrases) == (theirs.answer, theirs.phrases)
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)


WORLD = ("--option=length=5", "--option=size=32", "--option=seed=3")


def test_the_world_is_prepared_with_the_split_that_stands_for_its_folder(tmp_path, capsys):
    output = tmp_path / "captions"
    assert run("heldout", output, *WORLD, SMALL, dataset="world_captions") == 0
    raw = open_dataset("world_captions", "heldout", length=5, size=32, seed=3)
    with pytest.raises(DataError, match=r"holds the split 'heldout' of world_captions, 'train' was asked for"):
        PreparedCaptions.open(output)
    prepared = PreparedCaptions.open(output, "heldout")
    assert prepared.name == "world captions (heldout)"
    assert_same_captions(prepared, [raw.read(index) for index in range(5)], "nowhere")
    few = ("--option=length=2", "--option=size=16", "--option=frames=2")
    assert run("heldout", tmp_path / "clips", *few, dataset="world") == 0
    clips = [json.loads((tmp_path / f"clips/{name}.json").read_text()) for name in ("settings", "index")]
    assert [each["split"] for each in clips] == ["heldout", "heldout"]
    assert len(Prepared.open(tmp_path / "clips", "heldout")) == 2


def test_language_draws_the_same_batches_from_shards(tmp_path):
    assert run("train", tmp_path / "out", *WORLD, dataset="world_captions") == 0
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    readers = (
        open_dataset("world_captions", "train", length=5, size=32, seed=3),
        open_dataset("prepared_captions", tmp_path / "out"),
    )
    fields = {"global_batch_size": 4, "tokenizer": tokenizer, "max_tokens": 512, "size": 32, "texts_per_image": 3}
    raw, prepared = (CaptionData(sources=(reader,), **fields).dataset(1, 0, 1)[1] for reader in readers)
    for name in ("image", "tokens", "segment", "target_mask", "record"):
        np.testing.assert_array_equal(raw[name], prepared[name])
    assert raw["target_mask"].any()
    assert (raw["texts"] == 3).all()


def test_texts_that_a_record_implies_are_not_stored_and_shards_without_any_are_read(tmp_path):
    write_grit(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", dataset="grit") == 0
    prepared = PreparedCaptions.open(tmp_path / "out")
    record, others = prepared.record(0), prepared.read(0).others
    assert record.others is None
    assert others[0][0] == "Describe the image."
    told = dataclasses.replace(record, others=(("ask", "say"),))
    assert decode_caption(encode_caption(told), "x").others == (("ask", "say"),)
    older = {key: value for key, value in vars(record).items() if key not in ("others", "boxes", "picture")}
    data = pack(older, {"boxes": record.boxes, "picture": as_tensor(record.picture)})
    assert decode_caption(data, "x").others is None


def test_captions_lost_on_the_way_come_to_the_same_bytes(tmp_path):
    """Also from another place, and without the shards and the index that a stop kept from being written."""
    write_sa1b(tmp_path / "in")
    write_sa1b(tmp_path / "elsewhere")
    for name in ("in", "elsewhere"):
        assert run(tmp_path / name, tmp_path / f"out_{name}", SMALL, dataset="sa1b_caption") == 0
    whole = contents(tmp_path / "out_in")
    assert contents(tmp_path / "out_elsewhere") == whole
    for file in ("index.json", "shards/00001.json", "shards/00000.array_record"):
        (tmp_path / "out_in" / file).unlink()
    assert run(tmp_path / "in", tmp_path / "out_in", SMALL, dataset="sa1b_caption") == 0
    assert contents(tmp_path / "out_in") == whole


def test_a_damaged_picture_of_a_caption_is_counted(tmp_path):
    write_grit(tmp_path / "in")
    rows = {"caption": CAPTION, "ref_exps": EXPRESSIONS}
    members = {"1.jpg": photograph("dog"), "2.jpg": photograph("china")[:5000]}
    members |= {f"{key}.json": json.dumps(rows).encode() for key in (1, 2)}
    write_tar(tmp_path / "in/images/00001.tar", members)
    assert run(tmp_path / "in", tmp_path / "out", dataset="grit") == 0
    assert skipped(tmp_path / "out") == {"caption has no text": 1, "image cannot be decoded": 1}
    paths = [PreparedCaptions.open(tmp_path / "out").record(index).path for index in range(2)]
    assert paths == ["images/00000.tar:00000000", "images/00001.tar:1"]
