"""DataComp and ImageNet-21K: written as published, read back as the photographs that went in; evil tars are refused."""

import io
import pickle
import tarfile
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tar_cases import photograph, write_shard, write_tar

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.images import read_image
from omnistream_jax.data.readers.images import open_datacomp, open_imagenet21k
from omnistream_jax.data.readers.webdataset import index_tars
from omnistream_jax.data.ssl import SelfSupervisedData

UIDS = ("000102030405060708090a0b0c0d0e0f", "ffeeddccbbaa99887766554433221100", "0123456789abcdef0123456789abcdef")
NAMES = {"000000000": "astronaut", "000000001": "coffee", "000010000": "china"}


def _decoded(name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(photograph(name))))


def _rng():
    return np.random.default_rng(0)


@pytest.fixture
def datacomp(tmp_path):
    uids = {key: {"uid": uid} for key, uid in zip(NAMES, UIDS, strict=True)}
    first = {key: NAMES[key] for key in ("000000000", "000000001")}
    write_shard(tmp_path / "shards/00000000.tar", first, uids)
    write_shard(tmp_path / "shards/00000001.tar", {"000010000": "china"}, {"000010000": uids["000010000"]}, beside=True)
    return tmp_path


def test_datacomp_is_read_back(datacomp):
    source = pickle.loads(pickle.dumps(open_datacomp(datacomp)))  # it goes to workers
    assert (len(source), source.max_frames) == (3, 1)
    for index, (key, name) in enumerate(NAMES.items()):
        sample = source.sample(index, _rng())
        np.testing.assert_array_equal(sample.frames[0], _decoded(name))
        assert sample.path == f"{datacomp}/shards/0000000{index // 2}.tar:{key}"
    np.testing.assert_array_equal(source.sample(2, _rng()).frames[0, 10, 20], [181, 206, 236])  # a Chinese sky
    assert len(open_datacomp(datacomp / "shards")) == 3
    with pytest.raises(DataError, match=r"a photograph has 1 frame, a clip of 4"):
        source.sample(0, _rng(), frames=4)


def test_datacomp_trains(datacomp):
    data = SelfSupervisedData(sources=(open_datacomp(datacomp),), global_batch_size=2, global_size=32, local_size=16)
    batch = data.dataset(0, 0, 1)[0]
    assert batch["global_crops"].shape == (2, 2, 1, 32, 32, 3)
    assert batch["global_crops"].std() > 10


def test_a_subset_of_datacomp_is_told_by_uids(datacomp, tmp_path):
    halves = [(0x0123456789ABCDEF, 0x0123456789ABCDEF), (0x0001020304050607, 0x08090A0B0C0D0E0F), (5, 6)]
    np.save(tmp_path / "subset.npy", np.array(halves, "u8,u8"))
    source = open_datacomp(datacomp, subset=tmp_path / "subset.npy")  # one uid from JSON, one from a table beside
    assert [source.describe(index)[-9:] for index in range(len(source))] == ["000000000", "000010000"]
    np.testing.assert_array_equal(source.sample(1, _rng()).frames[0], _decoded("china"))
    np.save(tmp_path / "none.npy", np.array([(5, 6)], "u8,u8"))
    with pytest.raises(DataError, match=r"its tars hold no image of .*none.npy"):
        open_datacomp(datacomp, subset=tmp_path / "none.npy")
    np.save(tmp_path / "wrong.npy", np.arange(3))
    with pytest.raises(DataError, match=r"wrong.npy: expected a .npy file of uids, dtype u8,u8"):
        open_datacomp(datacomp, subset=tmp_path / "wrong.npy")


def test_another_layout_is_no_datacomp(tmp_path):
    with pytest.raises(DataError, match=r"holds no .tar file; expected img2dataset's 00000000.tar"):
        open_datacomp(tmp_path)
    write_tar(tmp_path / "00000000.tar", {"0.txt": b"text"})
    with pytest.raises(DataError, match=r"its tars hold no image"):
        open_datacomp(tmp_path)
    with pytest.raises(DataError, match=r"split: 'val', expected train"):
        open_datacomp(tmp_path, "val")


def _index(path):
    return index_tars([path], {"image": (".jpg",), "json": (".json",)}, required="image")


def test_records_are_files_with_one_name_before_the_first_dot(tmp_path):
    long = "deep/" * 40 + "x"
    files = {
        "./a.jpg": b"1",
        "b/a.jpg": b"22",
        "b/a.json": b"{}",
        "._a.jpg": b"mac",
        "c.seg.jpg": b"s",
        "d.json": b"{}",
    }
    records = _index(write_tar(tmp_path / "x.tar", {**files, f"{long}.JPG": b"333"}))
    assert [records.key(index) for index in range(len(records))] == ["a", "b/a", long]
    assert [records.read(index, "image") for index in range(3)] == [b"1", b"22", b"333"]
    assert records.read_json(1) == {}
    with pytest.raises(DataError, match=r"x\.tar:a: has no json file"):
        records.read(0, "json")


def test_a_part_of_a_tar_is_a_file_of_its_own(tmp_path):
    records = _index(
        write_tar(tmp_path / "x.tar", {"a.jpg": b"before" * 100, "b.jpg": b"0123456789", "c.jpg": b"after"})
    )
    with records.open(1, "image") as file:
        assert file.read(3) == b"012"
        assert file.seek(-2, io.SEEK_END) == 8
        assert file.read() == b"89"
        assert file.read() == b""
        with pytest.raises(OSError, match=r"before the beginning"):
            file.seek(-1)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"x.tar:b: 0 bytes of its image file are there, not 10"):
        records.read(1, "image")


def _member(name, kind=tarfile.REGTYPE, target="", data=b""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(data)
    return member, io.BytesIO(data)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (_member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'a.jpg' is a link or a special file"),
        (_member("a.jpg", tarfile.LNKTYPE, "b.jpg"), "'a.jpg' is a link or a special file"),
        (_member("a.jpg", tarfile.CHRTYPE), "'a.jpg' is a link or a special file"),
        (_member("../a.jpg", data=b"x"), r"the name '\.\./a\.jpg' leads out of the archive"),
        (_member("x/../../a.jpg", data=b"x"), r"the name 'x/\.\./\.\./a\.jpg' leads out of the archive"),
        (_member("/etc/a.jpg", data=b"x"), "the name '/etc/a.jpg' leads out of the archive"),
    ],
)
def test_evil_members_are_refused(tmp_path, member, message):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(*_member("good.jpg", data=b"x"))
        tar.addfile(*member)
    with pytest.raises(DataError, match=rf"x.tar: {message}"):
        _index(tmp_path / "x.tar")


def test_damaged_tars_are_refused(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{index}.jpg": bytes([index]) * 700 for index in range(9)}).read_bytes()
    cases = {
        "cut": whole[: 3 * 1536 + 700],  # within the fourth file
        "damaged": whole[: 4 * 1536] + b"\xff" * 512 + whole[4 * 1536 + 512 :],
        "text": b"this is no tar" * 100,
        "empty": b"",
    }
    for name, data in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}.tar: expected a whole tar file that is not compressed"):
            _index(path)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(*_member("a.jpg", data=b"x"))
    with pytest.raises(DataError, match=r"packed.tar: expected a whole tar file that is not compressed"):
        _index(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        tar.addfile(*_member("a.jpg", data=b"x"))
        tar.addfile(*_member("a.jpg", data=b"y"))
    with pytest.raises(DataError, match=r"twice.tar: record 'a' has two files for one part"):
        _index(tmp_path / "twice.tar")


def test_a_huge_tar_is_indexed_without_reading_bodies(tmp_path):
    path, size = tmp_path / "huge.tar", 3 << 30
    with open(path, "wb") as file:  # holes on the disk
        for name in ("a.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf())
            file.seek(size, io.SEEK_CUR)
        file.write(b"\0" * 1024)
    started = time.monotonic()
    records = _index(path)
    assert time.monotonic() - started < 0.5  # reading six gigabytes takes seconds, even of zeros
    assert records.offsets[1, 0] == size + 1024
    with pytest.raises(DataError, match=r"huge.tar:b: its image file has 3,221,225,472 bytes, at most 268,435,456"):
        records.read(1, "image")


def test_pictures_in_archives_are_limited():
    picture, drawing = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with pytest.raises(DataError, match=r"0\.png: 4 x 4 pixels, at most 10 are allowed"):
        read_image("0.png", file=picture, max_pixels=10)
    Image.new("RGB", (4, 4)).save(drawing, "EPS")  # which Pillow would hand to Ghostscript
    with pytest.raises(DataError, match=r"x\.jpg: expected a whole image file"):
        read_image("x.jpg", file=io.BytesIO(drawing.getvalue()))


@pytest.mark.parametrize("layout", ["whole", "P"])
def test_imagenet21k_is_read_back(tmp_path, layout):
    root = tmp_path if layout == "whole" else tmp_path / "imagenet21k_train"
    for name, photo in {"n00004475/n00004475_6590": "dog", "n01440764/n01440764_2": "fruits"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.JPEG").write_bytes(photograph(photo))
    (root / "n01440764" / "readme.txt").write_text("no picture")
    (root / "notes").mkdir()
    source = pickle.loads(pickle.dumps(open_imagenet21k(tmp_path)))
    assert (len(source), source.labels) == (2, ("n00004475", "n01440764"))
    assert [source.label(index) for index in range(2)] == [0, 1]
    sample = source.sample(1, _rng())
    assert sample.path == f"{root}/n01440764/n01440764_2.JPEG"
    assert sample.frames.shape == (1, 256, 273, 3)
    np.testing.assert_array_equal(sample.frames[0], _decoded("fruits"))
    expected = "has no imagenet21k_val" if layout == "whole" else "imagenet21k_val: there is no such file or folder"
    with pytest.raises(DataError, match=expected):
        open_imagenet21k(tmp_path, "val")


def test_another_layout_is_no_imagenet21k(tmp_path):
    (tmp_path / "n00004475.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no WNID/WNID_N.JPEG"):
        open_imagenet21k(tmp_path)
    with pytest.raises(DataError, match=r"gone: there is no such file or folder; expected the folder of ImageNet-21K"):
        open_imagenet21k(tmp_path / "gone")


def test_a_table_beside_a_tar_without_the_column_gives_way_to_json(datacomp, tmp_path):
    beside = datacomp / "shards/00000001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["000010000"], "url": ["x"]}), beside)
    np.save(tmp_path / "subset.npy", np.array([(0x0123456789ABCDEF, 0x0123456789ABCDEF)], "u8,u8"))
    assert len(open_datacomp(datacomp, subset=tmp_path / "subset.npy")) == 1
