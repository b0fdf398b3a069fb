"""Kinetics, Something-Something V2 and PE-Video: written as published, read back with frames and labels."""

import io
import json
import pickle

import av
import numpy as np
import pytest
from tar_cases import video, write_tar

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.videos import open_kinetics, open_pe_video, open_ssv2
from omnistream_jax.data.sources import clip_indices
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.data.video import open_video


def _rng():
    return np.random.default_rng(0)


def _decoded(name: str) -> np.ndarray:
    """All frames, by PyAV alone."""
    with av.open(io.BytesIO(video(name))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _put(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video(name))
    return path


def _assert_clip(sample, name, frames=4, stride=(1, 3)):
    """That a sample is a clip of an embedded video, up to rounding in the conversion of colours."""
    every = _decoded(name)
    indices = clip_indices(_rng(), len(every), frames, stride, "x")
    difference = np.abs(sample.frames.astype(int) - every[indices].astype(int))
    assert sample.frames.shape == (frames, *every.shape[1:])
    assert difference.mean() < 2
    assert np.abs(sample.frames[0].astype(int) - every[-1].astype(int)).mean() > difference.mean()


@pytest.fixture
def kinetics(tmp_path):
    _put(tmp_path / "train/abseiling/-3B32lodo2M_000059_000069.mp4", "street_1")
    _put(tmp_path / "train/riding a bike/0002Lo35mTs_000007_000017.mp4", "plant")
    return tmp_path


def test_kinetics_takes_labels_from_folders(kinetics):
    source = pickle.loads(pickle.dumps(open_kinetics(kinetics)))
    assert source.labels == ("abseiling", "riding a bike")
    assert [source.label(index) for index in range(len(source))] == [0, 1]
    _assert_clip(source.sample(1, _rng(), 4, (1, 3)), "plant")
    with pytest.raises(
        DataError, match=r"val: there is no such file or folder; expected the split's folder of classes"
    ):
        open_kinetics(kinetics, "val")


def test_kinetics_takes_labels_from_the_published_table(kinetics, tmp_path):
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "riding a bike,0002Lo35mTs,7,17,train\n"
        "zumba,gonegonegon,0,10,train\n"
        "abseiling,-3B32lodo2M,59,69,validate\n"
    )
    source = open_kinetics(kinetics, annotations=table)
    assert (len(source), source.missing, source.labels, source.label(0)) == (1, 1, ("riding a bike",), 0)
    assert source.describe(0).endswith("train/riding a bike/0002Lo35mTs_000007_000017.mp4")
    table.write_text("youtube_id,time_start,time_end,split\n-3B32lodo2M,59,69,train\n")  # as the test split is
    source = open_kinetics(kinetics, annotations=table)
    assert (source.labels, source.label(0)) == ((), None)
    table.write_text("label,youtube_id,time_start,time_end,split\nzumba,gonegonegon,0,10,train\n")
    with pytest.raises(DataError, match=r"holds none of the 1 videos"):
        open_kinetics(kinetics, annotations=table)
    table.write_text("label,youtube_id,time_start,time_end,split\nzumba,gonegonegon,soon,10,train\n")
    with pytest.raises(DataError, match=r"train.csv, row 0: .*expected time_start and time_end in whole seconds"):
        open_kinetics(kinetics, annotations=table)


@pytest.mark.parametrize("line", ["{path},{label}", "{path} {label}", "{path} , {label}"])
def test_kinetics_takes_labels_from_a_list(kinetics, tmp_path, line):
    rows = [("train/riding a bike/0002Lo35mTs_000007_000017.mp4", 391), ("train/gone.mp4", 7)]
    (tmp_path / "list.csv").write_text("".join(line.format(path=path, label=label) + "\n" for path, label in rows))
    source = open_kinetics(kinetics, annotations=tmp_path / "list.csv", short_side=120)
    assert (len(source), source.labels, source.label(0)) == (2, (), 391)
    assert source.sample(0, _rng(), 2, (1, 1)).frames.shape == (2, 120, 160, 3)
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such video file"):
        source.sample(1, _rng(), 2, (1, 1))
    (tmp_path / "list.csv").write_text("a.mp4,1\nb.mp4\n")
    with pytest.raises(DataError, match=r"list.csv, line 2: 'b.mp4'; expected a video's path and a whole number"):
        open_kinetics(kinetics, annotations=tmp_path / "list.csv")


def test_kinetics_without_classes_has_no_labels(tmp_path):
    _put(tmp_path / "val/0002Lo35mTs_000007_000017.mp4", "plant")
    source = open_kinetics(tmp_path, "val")
    assert (source.labels, source.label(0), len(source)) == ((), None, 1)


def _write_ssv2(root, folder):
    _put(root / "20bn-something-something-v2/74225.webm", "tree")
    _put(root / "20bn-something-something-v2/100904.webm", "plant")
    rows = [
        {"id": "74225", "label": "x", "template": "Spinning [something] so it continues spinning", "placeholders": []},
        {"id": "3", "label": "x", "template": "Holding [something]", "placeholders": []},
        {"id": "100904", "label": "x", "template": "Putting [something similar to other things]", "placeholders": []},
    ]
    labels = {
        "Holding something": "0",
        "Spinning something so it continues spinning": "2",
        "Putting something similar to other things": "1",
    }
    name = "labels/{}.json" if folder else "something-something-v2-{}.json"
    (root / "labels").mkdir()
    (root / name.format("train")).write_text(json.dumps(rows))
    (root / name.format("test")).write_text(json.dumps([{"id": "74225"}]))
    (root / name.format("labels")).write_text(json.dumps(labels))
    return root / name.format("train")


@pytest.mark.parametrize("folder", [False, True])
def test_ssv2_is_read_back(tmp_path, folder):
    listing = _write_ssv2(tmp_path, folder)
    source = pickle.loads(pickle.dumps(open_ssv2(tmp_path)))
    assert [source.label(index) for index in range(len(source))] == [2, 1]
    assert source.labels[2] == "Spinning something so it continues spinning"
    assert source.missing == 1
    _assert_clip(source.sample(0, _rng(), 4, (1, 3)), "tree")
    assert open_ssv2(tmp_path, "test").label(0) is None
    listing.write_text(json.dumps([{"id": "74225", "template": "Eating [something]"}]))
    with pytest.raises(DataError, match=r"row 0: the template 'Eating something' is not among the 3 labels"):
        open_ssv2(tmp_path)
    listing.write_text(json.dumps([{"id": "../../etc/passwd"}]))
    with pytest.raises(DataError, match=r"row 0: .*expected an object with a whole number as id"):
        open_ssv2(tmp_path)
    listing.write_text(json.dumps([{"id": "5"}]))
    with pytest.raises(DataError, match=r"holds none of the 1 videos"):
        open_ssv2(tmp_path)


def test_another_layout_is_no_ssv2(tmp_path):
    with pytest.raises(DataError, match=r"20bn-something-something-v2: there is no .* expected the folder of ID.webm"):
        open_ssv2(tmp_path)
    (tmp_path / "20bn-something-something-v2").mkdir()
    with pytest.raises(DataError, match=r"labels/labels.json: there is no .* or something-something-v2-labels.json"):
        open_ssv2(tmp_path)


@pytest.fixture
def pe_video(tmp_path):
    row = json.dumps({"human_caption": "A bird dances.", "category": "animals"}).encode()
    write_tar(tmp_path / "train/000000.tar", {"7f.mp4": video("cockatoo"), "7f.json": row, "80.mp4": video("plant")})
    write_tar(tmp_path / "train/000001.tar", {"91.mp4": video("tree"), "91.json": row})
    return tmp_path


def test_pe_video_is_read_back(pe_video):
    source = pickle.loads(pickle.dumps(open_pe_video(pe_video)))
    assert (len(source), source.max_frames) == (3, None)
    for index, name in enumerate(("cockatoo", "plant", "tree")):
        _assert_clip(source.sample(index, _rng(), 4, (1, 3)), name)
    assert source.describe(2) == f"{pe_video}/train/000001.tar:91"
    assert source.annotation(0)["human_caption"] == "A bird dances."
    with pytest.raises(DataError, match=r"000000.tar:80: has no json file"):
        source.annotation(1)
    with pytest.raises(DataError, match=r"000000.tar:80: has 36 frames, a clip of 40 frames at stride 1 needs 40"):
        source.sample(1, _rng(), 40, (1, 1))
    assert open_pe_video(pe_video, short_side=72).sample(2, _rng(), 2, (1, 1)).frames.shape == (2, 72, 96, 3)


def test_frames_from_a_tar_equal_those_from_a_file(pe_video, tmp_path):
    sample = open_pe_video(pe_video).sample(1, _rng(), 6, (2, 5))
    indices = clip_indices(_rng(), 36, 6, (2, 5), "x")
    with open_video(_put(tmp_path / "plant.mp4", "plant")) as reader:
        np.testing.assert_array_equal(sample.frames, reader.read(indices))


def test_clips_at_a_frame_rate(pe_video, tmp_path):
    _put(tmp_path / "val/a_000000_000010.mp4", "tree")  # 15 frames a second
    expected = clip_indices(_rng(), 68, 4, (2, 2), "x", 3.0)
    assert np.diff(expected).tolist() == [6, 6, 6]
    with open_video(tmp_path / "val/a_000000_000010.mp4") as reader:
        frames = reader.read(expected)
    for source, index in (
        (open_kinetics(tmp_path, "val", frame_rate=5.0), 0),
        (open_pe_video(pe_video, frame_rate=5.0), 2),
    ):
        np.testing.assert_array_equal(source.sample(index, _rng(), 4, (2, 2)).frames, frames)


def test_pe_video_trains(pe_video):
    data = SelfSupervisedData(
        sources=(open_pe_video(pe_video),),
        global_batch_size=2,
        frames=4,
        global_size=32,
        local_size=16,
        mask_scheme="tubes",
    )
    assert data.dataset(0, 0, 1)[0]["global_crops"].shape == (2, 2, 4, 32, 32, 3)


def test_what_is_no_video_is_refused(pe_video, tmp_path):
    script = f"ffconcat version 1.0\nfile {tmp_path}/plant.mp4\n".encode()  # FFmpeg would play the other file
    write_tar(pe_video / "train/000002.tar", {"a.mp4": script, "b.mp4": video("plant")[:50_000]})
    source = open_pe_video(pe_video)
    for index in (3, 4):
        with pytest.raises(
            DataError, match=r"000002.tar:[ab]: (expected a video file|truncated|not one frame|the file is)"
        ):
            source.sample(index, _rng(), 2, (1, 1))


def test_another_layout_is_no_pe_video(tmp_path):
    with pytest.raises(DataError, match=r"train: there is no .* expected the split's folder of 000000.tar"):
        open_pe_video(tmp_path)
    write_tar(tmp_path / "train/000000.tar", {"a.json": b"{}"})
    with pytest.raises(DataError, match=r"its tars hold no video; expected records of .mp4 and .json"):
        open_pe_video(tmp_path)
