"""RefCOCO: a pickle as published, converted without unpickling, gives the phrases and boxes that went in."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tar_cases import photograph
from test_safe_pickle import _Evil

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers import refcoco
from omnistream_jax.data.readers.refcoco import convert_refs, open_refcoco


def _reference(number, target, split, *sentences):
    return {
        "sent_ids": [10 * number + place for place in range(len(sentences))],
        "file_name": f"COCO_train2014_{number:012d}_{target}.jpg",
        "ann_id": target,
        "ref_id": number,
        "image_id": 581857,
        "split": split,
        "sentences": [
            {"tokens": sentence.split(), "raw": sentence.upper(), "sent_id": 10 * number + place, "sent": sentence}
            for place, sentence in enumerate(sentences)
        ],
        "category_id": 1,
    }


REFERENCES = [
    _reference(1, 501, "train", "the woman in orange", "astronaut"),
    _reference(2, 502, "testA", "flag on the left"),
    _reference(3, 502, "train", "flag", " "),
    _reference(4, 503, "train", "nothing wide"),
    _reference(5, 504, "train", "beyond the border"),
    _reference(6, 599, "train", "what is not there"),
]
BOXES = {501: [64, 32, 128, 192], 502: [0, 0, 51.2, 230.4], 503: [10, 10, 0, 20], 504: [200, 10, 100, 20]}


@pytest.fixture(params=["refcoco", "refcoco+", "refcocog"])
def which(request):
    return request.param


@pytest.fixture
def root(tmp_path, which):
    folder = tmp_path / which
    folder.mkdir()
    name = "COCO_train2014_000000581857.jpg"
    instances = {
        "images": [{"id": 581857, "file_name": name, "width": 256, "height": 256}],
        "annotations": [{"id": key, "image_id": 581857, "bbox": box, "iscrowd": 0} for key, box in BOXES.items()],
        "categories": [],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / f"refs({refcoco.SPLIT_BY[which]}).p").write_bytes(pickle.dumps(REFERENCES, protocol=0))
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014" / name).write_bytes(photograph("astronaut"))
    return tmp_path


def _convert(root, which):
    return convert_refs(root / which / f"refs({refcoco.SPLIT_BY[which]}).p")


def test_references_are_read_back(root, which):
    assert _convert(root, which) == 6
    source = pickle.loads(pickle.dumps(open_refcoco(root, which=which)))
    assert len(source) == 7  # sentences of the split
    sample = source.read(0)
    assert sample.instruction == "Give the box of <|object_ref_start|>the woman in orange<|object_ref_end|>."
    # 64 / 256 = 0.25, 32 / 256 = 0.125, (64 + 128) / 256 = 0.75, (32 + 192) / 256 = 0.875
    assert sample.answer == "<|box_start|>(250,125),(750,875)<|box_end|>"
    np.testing.assert_array_equal(sample.boxes, [[0.25, 0.125, 0.75, 0.875]])
    assert sample.phrases == ("the woman in orange",)
    assert sample.image.shape == (256, 256, 3)
    assert sample.path.endswith("train2014/COCO_train2014_000000581857.jpg")
    assert source.read(1).phrases == ("astronaut",)
    assert source.describe(1) == f"{which} (train), ref_id 1, sentence 1"


def test_splits_are_kept_apart(root, which):
    _convert(root, which)
    if which == "refcocog":
        with pytest.raises(DataError, match=r"split: 'testA', refcocog has train, val, test"):
            open_refcoco(root, "testA", which=which)
        return
    source = open_refcoco(root, "testA", which=which)
    assert [source.read(index).phrases for index in range(len(source))] == [("flag on the left",)]
    assert source.read(0).answer == "<|box_start|>(0,0),(200,900)<|box_end|>"
    with pytest.raises(DataError, match=r"holds no reference of the split val"):
        open_refcoco(root, "val", which=which)


@pytest.mark.parametrize(
    ("index", "message", "reason"),
    [
        (3, r"ref_id 3, sentence 1: its text is ' ', expected some", "caption has no text"),
        (4, r"ref_id 4, sentence 0: a box is .*, expected x1 < x2, y1 < y2", "box is none"),
        (5, r"ref_id 5, sentence 0: a box is .*, expected shares 0 to 1", "box outside"),
        (6, r"ref_id 6, sentence 0: its object 599 is not in instances.json", None),
    ],
)
def test_malformed_references_are_named_when_read(root, which, index, message, reason):
    _convert(root, which)
    with pytest.raises(DataError, match=message) as caught:
        open_refcoco(root, which=which).read(index)
    assert caught.value.reason == reason


def test_another_layout_is_refused_by_what_was_expected(root, which):
    refs = f"refs({refcoco.SPLIT_BY[which]})"
    with pytest.raises(DataError) as caught:
        open_refcoco(root, which=which)
    message = str(caught.value)
    assert f"{refs}.json: is not there; make it of {refs}.p, which is not unpickled, with\n" in message
    command = message.split("\n")[1].strip().replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=Path(__file__).parents[1])
    assert len(open_refcoco(root, which=which)) > 0
    (root / which / f"{refs}.p").unlink()
    (root / which / f"{refs}.json").unlink()
    with pytest.raises(DataError, match=r"there is no such file or folder; expected the references, converted to JSON"):
        open_refcoco(root, which=which)
    with pytest.raises(DataError, match=r"which: 'refclef', expected one of refcoco, refcoco\+, refcocog"):
        open_refcoco(root, which="refclef")
    with pytest.raises(DataError, match=r"train2014: there is no .* expected COCO's images"):
        open_refcoco(root, which=which, images=root / "gone" / "train2014")


def test_images_cannot_lie_elsewhere(root, which):
    _convert(root, which)
    path = root / which / "instances.json"
    path.write_text(path.read_text().replace("COCO_train2014_000000581857.jpg", "../../secret.jpg"))
    with pytest.raises(DataError, match=r"the image's name '../../secret.jpg' is a path"):
        open_refcoco(root, which=which)


def test_an_evil_or_foreign_pickle_is_not_converted(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([_Evil(tmp_path / "called")], protocol=2))
    with pytest.raises(DataError, match=r"holds the instruction GLOBAL"):
        convert_refs(path)
    path.write_bytes(pickle.dumps([{"ref_id": 1}]))
    with pytest.raises(DataError, match=r"reference 0: expected ref_id, ann_id, split and sentences"):
        convert_refs(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"is a dict, expected a list of references"):
        convert_refs(path)
    assert [each.name for each in tmp_path.iterdir()] == ["refs(unc).p"]
