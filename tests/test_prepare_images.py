"""Prepared images: the published ones again, byte for byte, whatever happened while they were written."""

import io
import json
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps
from prepare_cases import assert_a_killed_run_goes_on_to_the_same_bytes, contents, run
from tar_cases import photograph, write_shard

from omnistream_jax.data import picture_files
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.picture_records import decode_caption, decode_image
from omnistream_jax.data.readers.images import open_datacomp, open_imagenet21k
from omnistream_jax.data.readers.prepared import Prepared
from omnistream_jax.data.readers.prepared_captions import PreparedCaptions
from omnistream_jax.data.readers.prepared_images import PreparedImages
from omnistream_jax.data.record_bytes import as_tensor, pack
from omnistream_jax.data.registry import open_dataset
from omnistream_jax.data.ssl import SelfSupervisedData

SMALL = "--shard_records=2"
ROTATED = 6  # EXIF's orientation of a telephone held upright


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return encoded(Image.open(io.BytesIO(photograph("coffee"))), "jpeg", exif=exif)


def files() -> dict[str, bytes]:
    china = Image.open(io.BytesIO(photograph("china")))
    return {
        "n00000001/n00000001_1.JPEG": photograph("astronaut"),
        "n00000001/n00000001_2.JPEG": rotated_jpeg(),
        "n00000002/n00000002_1.jpg": encoded(china.convert("L").resize((30, 20)), "jpeg"),
        "n00000002/n00000002_2.png": encoded(china.resize((90, 60)).convert("P"), "png"),
        "n00000003/n00000003_1.webp": encoded(china, "webp", quality=60),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five pictures of three classes, in three formats; read only."""
    return write_imagenet(tmp_path_factory.mktemp("source"), files())


def write_imagenet(root, pictures):
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    output = tmp_path_factory.mktemp("prepared") / "imagenet21k"
    assert run(source, output, SMALL, dataset="imagenet21k") == 0
    return output


def shown(data: bytes) -> np.ndarray:
    """A picture's file as it is shown, by Pillow alone."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def rng():
    return np.random.default_rng(0)


def skipped(output) -> dict[str, int]:
    index = json.loads((output / "index.json").read_text())
    return {reason: entry["count"] for reason, entry in index["skipped"].items()}


# Images


def test_images_keep_their_published_bytes(undisturbed, source):
    raw, prepared = open_imagenet21k(source), pickle.loads(pickle.dumps(PreparedImages.open(undisturbed)))
    assert (prepared.name, len(prepared), prepared.labels) == ("imagenet21k (train)", 5, raw.labels)
    assert raw.labels == ("n00000001", "n00000002", "n00000003")
    for index, (name, data) in enumerate(files().items()):
        record = prepared.record(index)
        assert (record.name, record.picture, record.source) == (name, data, raw.name)
        assert (record.label, record.label_name) == (raw.label(index), name.partition("/")[0])
        assert prepared.label(index) == raw.label(index) == (0, 0, 1, 1, 2)[index]
        sample = prepared.sample(index, rng())
        np.testing.assert_array_equal(sample.frames, raw.sample(index, rng()).frames)
        np.testing.assert_array_equal(sample.frames[0], shown(data))
        assert sample.path == f"{undisturbed}/shards/{index // 2:05d}.array_record, record {index % 2}: {name}"
    assert prepared.sample(1, rng()).frames.shape == (1, 384, 256, 3)  # turned upright
    with pytest.raises(DataError, match=r"n00000001_1.JPEG: a photograph has 1 frame, a clip of 2 was asked for"):
        prepared.sample(0, rng(), frames=2)
    with pytest.raises(IndexError):
        prepared.sample(5, rng())


def test_the_index_tells_what_is_there(undisturbed):
    index = json.loads((undisturbed / "index.json").read_text())
    assert (index["kind"], index["records"], index["skipped"]) == ("images", 5, {})
    assert [shard["records"] for shard in index["shards"]] == [2, 2, 1]
    assert index["labels"] == ["n00000001", "n00000002", "n00000003"]
    assert all(re.fullmatch("[0-9a-f]{64}", shard["sha256"]) for shard in index["shards"])


def test_self_supervision_draws_the_same_batches_from_shards(undisturbed, source):
    batches = [
        SelfSupervisedData(sources=(reader,), global_batch_size=4, global_size=32, local_size=16).dataset(3, 0, 1)[2]
        for reader in (open_imagenet21k(source), open_dataset("prepared_images", undisturbed))
    ]
    for name in ("global_crops", "local_crops", "masks", "record"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    assert batches[0]["global_crops"].std() > 10


def test_larger_images_are_scaled_and_smaller_ones_keep_their_bytes(source, tmp_path):
    line = ("--short_side=128", "--quality=90", SMALL)
    assert run(source, tmp_path / "out", *line, dataset="imagenet21k") == 0
    prepared, sizes = PreparedImages.open(tmp_path / "out"), []
    for index, data in enumerate(files().values()):
        picture = prepared.record(index).picture
        image, published = prepared.sample(index, rng()).frames[0], shown(data)
        sizes.append(image.shape[:2])
        if min(published.shape[:2]) <= 128:
            assert picture == data
            continue
        with Image.open(io.BytesIO(picture)) as stored:
            assert (stored.format, len(stored.getexif())) == ("JPEG", 0)  # not turned once more
        expected = Image.fromarray(published).resize(image.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(image.astype(int) - expected).mean() < 6  # a turned or shifted one is far beyond
    assert sizes == [(128, 128), (192, 128), (20, 30), (60, 90), (128, 192)]


def test_images_scaled_as_png_are_exact(source, tmp_path):
    assert run(source, tmp_path / "out", "--short_side=64", "--image_format=png", dataset="imagenet21k") == 0
    image = PreparedImages.open(tmp_path / "out").sample(0, rng()).frames[0]
    published = Image.fromarray(shown(photograph("astronaut")))
    np.testing.assert_array_equal(image, published.resize((64, 64), Image.Resampling.LANCZOS))


def test_datacomp_is_prepared_from_its_tars(tmp_path):
    shards = tmp_path / "in/shards"
    write_shard(shards / "00000000.tar", {"000000000": "astronaut", "000000001": "china"})
    write_shard(shards / "00000001.tar", {"000010000": "coffee"})
    assert run(tmp_path / "in", tmp_path / "out", dataset="datacomp") == 0
    prepared, raw = PreparedImages.open(tmp_path / "out"), open_datacomp(tmp_path / "in")
    names = ["shards/00000000.tar:000000000", "shards/00000000.tar:000000001", "shards/00000001.tar:000010000"]
    assert [prepared.record(index).name for index in range(3)] == names
    assert (prepared.labels, prepared.label(0)) == ((), None)
    assert prepared.record(2).picture == photograph("coffee")
    for index in range(3):
        np.testing.assert_array_equal(prepared.sample(index, rng()).frames, raw.sample(index, rng()).frames)
    np.testing.assert_array_equal(prepared.sample(1, rng()).frames[0, 10, 20], [181, 206, 236])  # a Chinese sky


def test_tfds_is_prepared(tmp_path, capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    from test_readers_tfds import FRAMES, _build, _png

    root, features = tmp_path / "in", tfds.features
    classes = {"image": features.Image(), "label": features.ClassLabel(names=["cat", "dog"])}
    pictures = [{"image": io.BytesIO(photograph(name)), "label": n} for n, name in enumerate(("coffee", "dog"))]
    clips = [{"video": [_png(frame) for frame in FRAMES]}]
    for builder in (
        _build("Pictures", classes, pictures),
        _build("Clips", {"video": features.Sequence(features.Image(shape=(12, 16, 3)))}, clips),
    ):
        builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    assert run(root, tmp_path / "out", "--option=name=pictures", dataset="tfds") == 0
    prepared = PreparedImages.open(tmp_path / "out")
    found = {prepared.record(index).label_name: prepared.record(index).picture for index in range(len(prepared))}
    assert found == {"cat": photograph("coffee"), "dog": photograph("dog")}
    assert run(root, tmp_path / "clips", "--option=name=clips", dataset="tfds") == 2
    assert "dataset tfds clips (train): its records are videos, stored as lists of pictures" in capsys.readouterr().err


# Stops, damage and other settings


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(undisturbed, source, tmp_path, capsys):
    assert_a_killed_run_goes_on_to_the_same_bytes(
        undisturbed, source, list(files())[4], tmp_path, PreparedImages.open, [SMALL], dataset="imagenet21k"
    )
    assert "3 shards, 2 finished already, 1 to do" in capsys.readouterr().out


def test_damaged_images_are_left_out_and_counted_by_reason(tmp_path, capsys):
    pictures = files()
    names = list(pictures)
    damaged = {
        names[0]: pictures[names[0]][:4000],
        names[2]: rng().bytes(3000),
        names[3]: b"",
        names[4]: encoded(Image.fromarray(np.full((8, 8), 4000, np.uint16)), "png"),  # 16 bits
        "n00000003/n00000003_2.png": encoded(Image.new("1", (9000, 8000)), "png"),
    }
    root = write_imagenet(tmp_path / "in", pictures | damaged)
    expected = {"image cannot be decoded": 4, "image is too large": 1}
    assert run(root, None, "--check", dataset="imagenet21k") == 1
    told = capsys.readouterr().out
    assert "imagenet21k (train): 6 records; 13,153,500 are published, 13,153,494 are not here" in told
    assert "1 records can be used, 5 faults" in told
    assert run(root, tmp_path / "out", SMALL, dataset="imagenet21k") == 0
    told = capsys.readouterr().out
    assert skipped(tmp_path / "out") == expected
    assert f"skipped 4: image cannot be decoded; the first: {names[0]}: expected a whole image file" in told
    assert re.search(r"1 images, 0\.\d MiB in 1 shards: .*index\.json", told)
    prepared = PreparedImages.open(tmp_path / "out")
    assert (len(prepared), prepared.record(0).name) == (1, names[1])


def test_what_cannot_be_stored_is_counted(source, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_files, "MAX_BYTES", len(photograph("astronaut")) - 1)
    largest = [name for name, data in files().items() if len(data) >= len(photograph("astronaut"))]
    assert run(source, tmp_path / "out", dataset="imagenet21k") == 0
    assert skipped(tmp_path / "out") == {"file is too large": len(largest)}
    wide = {"n00000001/n00000001_1.png": encoded(Image.new("1", (60_000, 9)), "png")}
    root = write_imagenet(tmp_path / "in", wide | {"n00000001/n00000001_2.jpg": files()["n00000002/n00000002_1.jpg"]})
    assert run(root, tmp_path / "wide", "--short_side=8", dataset="imagenet21k") == 0
    assert len(PreparedImages.open(tmp_path / "wide")) == 2  # 53,333 x 8 fits into JPEG
    wide = {"n00000001/n00000001_1.png": encoded(Image.new("1", (80_000, 9)), "png")}
    root = write_imagenet(
        tmp_path / "wider", wide | {"n00000001/n00000001_2.jpg": files()["n00000002/n00000002_1.jpg"]}
    )
    assert run(root, tmp_path / "too wide", "--short_side=8", dataset="imagenet21k") == 0
    assert skipped(tmp_path / "too wide") == {"image cannot be stored": 1}


def test_a_source_without_one_whole_picture_is_an_error(tmp_path, capsys):
    root = write_imagenet(tmp_path / "in", {"n00000001/n00000001_1.JPEG": b"no picture"})
    assert run(root, tmp_path / "out", dataset="imagenet21k") == 1
    assert "no picture could be read; skipped 1: image cannot be decoded" in capsys.readouterr().err


def test_checksums_find_a_flipped_bit(undisturbed, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    assert run(None, output, "--check", dataset="imagenet21k") == 0
    path = output / "shards/00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(photograph("astronaut")) + 999] ^= 1
    path.write_bytes(data)
    assert run(None, output, "--check", dataset="imagenet21k") == 1
    assert "00000.array_record: its sha256 is not that of the index" in capsys.readouterr().out
    prepared = PreparedImages.open(output)
    with pytest.raises(DataError, match=r"00000\.array_record: record 0 cannot be read") as caught:
        prepared.sample(0, rng())
    assert caught.value.reason == "shard is damaged"
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.array_record: there is no such file"):
        PreparedImages.open(output)


def test_prepared_images_can_be_checked_as_a_source(undisturbed, capsys):
    assert run(undisturbed, None, "--check", dataset="prepared_images") == 0
    assert "5 records can be used, 0 faults" in capsys.readouterr().out


def test_an_output_of_other_settings_or_another_source_is_refused(undisturbed, source, tmp_path, capsys):
    before = contents(undisturbed)
    assert run(source, undisturbed, SMALL, "--short_side=32", dataset="imagenet21k") == 2
    told = capsys.readouterr().err
    assert "holds shards of other settings" in told
    assert "'short_side': 0} -> " in told
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "n00000009").mkdir()  # a class without pictures
    assert run(other, undisturbed, SMALL, dataset="imagenet21k") == 2
    message = "was begun from a source of 5 images; there are {} now, with other {}: use that source, or another folder"
    assert message.format(5, "labels") in capsys.readouterr().err
    (other / list(files())[3]).unlink()
    assert run(other, undisturbed, SMALL, dataset="imagenet21k") == 2
    assert message.format(4, "names") in capsys.readouterr().err
    assert contents(undisturbed) == before
    (tmp_path / "letter.txt").write_text("not ours")
    assert run(source, tmp_path, dataset="imagenet21k") == 2
    assert "holds other files (letter.txt), expected a new or empty folder" in capsys.readouterr().err


def test_kinds_are_not_taken_for_each_other(undisturbed):
    with pytest.raises(
        DataError, match=r"is of the kind 'images', expected 'posed'; open it as dataset prepared_images"
    ):
        Prepared.open(undisturbed)
    with pytest.raises(
        DataError, match=r"is of the kind 'images', expected 'captions'; open it as dataset prepared_im"
    ):
        PreparedCaptions.open(undisturbed)
    with pytest.raises(DataError, match=r"holds the split 'train' of imagenet21k, 'val' was asked for"):
        PreparedImages.open(undisturbed, "val")


@pytest.mark.parametrize("decode", [decode_image, decode_caption])
def test_bytes_that_are_no_record_are_refused(decode, undisturbed):
    other = pack({"format": 7}, {"picture": as_tensor(b"x")})
    incomplete = pack({"name": "a"}, {"picture": as_tensor(b"x")})
    for data, why in ((b"no tensors", ""), (other, "its format is 7, expected 1"), (incomplete, "missing|phrases")):
        with pytest.raises(DataError, match=rf"here: expected a record of a prepared .*reading it failed \(.*({why})"):
            decode(data, "here")


@pytest.mark.parametrize(
    ("dataset", "arguments", "status", "message"),
    [
        ("imagenet21k", ("--shard_records=0",), 2, "shard_records: expected at least 1, got 0"),
        ("imagenet21k", ("--short_side=-1",), 2, "short_side: expected a number of pixels, or 0 to keep it, got -1"),
        ("imagenet21k", ("--short_side=64", "--quality=96"), 2, "quality: expected 1 to 95, got 96"),
        ("imagenet21k", ("--quality=90",), 2, "--quality: does nothing for images without --short_side"),
        ("grit", ("--image_format=png",), 2, "--image_format: does nothing for captions without --short_side"),
        ("imagenet21k", ("--chunk=8",), 2, "--chunk: does nothing for imagenet21k, whose kind is images"),
        ("kinetics", ("--shard_records=8",), 2, "--shard_records: does nothing for kinetics, whose kind is videos"),
        ("grit", ("--shard_videos=8",), 2, "--shard_videos: does nothing for grit, whose kind is captions"),
        ("prepared_images", (), 2, "dataset prepared_images: is prepared already"),
        ("prepared_captions", (), 2, "dataset prepared_captions: is prepared already"),
        ("imagenet21k", ("--split=test",), 1, "split: 'test', expected train or val"),
        ("datacomp", (), 1, "{source}: holds no .tar file; expected img2dataset's 00000000.tar"),
        ("grit", (), 1, "{source}/images: there is no such file or folder; expected img2dataset's folder of tars"),
        ("refcoco", (), 1, "{source}/refcoco: there is no such file or folder; expected the folder of refs(...).json"),
        ("sa1b_caption", ("--option=captions=x.jsonl",), 1, "{source}/x.jsonl: there is no such file or folder"),
    ],
)
def test_what_cannot_work_is_one_message(source, tmp_path, capsys, dataset, arguments, status, message):
    assert run(source, tmp_path / "out", *arguments, dataset=dataset) == status
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message.format(source=source)}")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()
