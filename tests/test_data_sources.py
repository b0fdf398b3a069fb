"""Sources: what they list, how clips are drawn, how they mix, and the errors of paths."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from clip_cases import real_frames, write_clip
from PIL import Image

from omnistream_jax.data.embedded import embedded_files, heldout_clip
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.sources import (
    clip_indices,
    embedded_source,
    image_source,
    mixture_weights,
    video_source,
)
from omnistream_jax.data.video import open_video


def _save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path)
    return path


def _rng():
    return np.random.default_rng(0)


def test_an_image_folder_is_read_as_a_tree(tmp_path):
    for value, name in enumerate(("b.JPG", "a/d.png", "a/c/e.webp")):
        _save(tmp_path / name, value)
    (tmp_path / "readme.md").write_text("no picture")
    source = image_source(tmp_path)
    names = [source.describe(index).removeprefix(f"{tmp_path}/") for index in range(len(source))]
    assert names == ["a/c/e.webp", "a/d.png", "b.JPG"]
    sample = source.sample(1, _rng())
    assert sample.frames.shape == (1, 6, 8, 3)
    assert sample.path.endswith("a/d.png")
    assert sample.frames[0, 0, 0, 0] == 1


def test_a_list_names_paths_relative_to_itself(tmp_path):
    _save(tmp_path / "pictures" / "x.png", 7)
    (tmp_path / "list.txt").write_text(f"pictures/x.png\n\n{tmp_path}/pictures/x.png\n")
    source = image_source(tmp_path / "list.txt")
    assert [source.sample(index, _rng()).frames[0, 0, 0, 0] for index in range(len(source))] == [7, 7]


def test_paths_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"gone: there is no such file or folder; expected a folder with image files"):
        image_source(tmp_path / "gone")
    with pytest.raises(DataError, match=f"{tmp_path}: holds no video file; expected a folder with video files"):
        video_source(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"table\.csv: its suffix is \.csv; expected"):
        video_source(tmp_path / "table.csv")
    (tmp_path / "list.txt").write_text("a.mp4\nb.gif\n")
    with pytest.raises(DataError, match=r"list\.txt, line 2: 'b\.gif' has an unknown suffix"):
        video_source(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match=r"list\.txt: holds no video file"):
        video_source(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("gone.mp4\n")
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such video file"):
        video_source(tmp_path / "list.txt").sample(0, _rng(), 2, (1, 1))


def test_embedded_splits_are_whole_and_do_not_overlap():
    counts = {
        kind: [len(embedded_files(kind, split)) for split in ("train", "heldout")] for kind in ("images", "videos")
    }
    assert counts == {"images": [15, 5], "videos": [7, 2]}
    total = 0
    for kind in counts:
        contents = [path.read_bytes() for split in ("train", "heldout") for path in embedded_files(kind, split)]
        assert len(set(contents)) == len(contents)
        total += sum(map(len, contents))
    assert total <= 4e6
    with pytest.raises(DataError, match="split is 'test', expected one of train, heldout"):
        embedded_files("images", "test")
    with pytest.raises(DataError, match="kind is 'sounds'"):
        embedded_source("sounds", "train")


def test_every_embedded_file_is_named_in_the_notice():
    folder = embedded_files("images", "train")[0].parents[2]
    notice = (Path(__file__).parents[1] / "NOTICE").read_text()
    for kind in ("images", "videos"):
        for split in ("train", "heldout"):
            for path in embedded_files(kind, split):
                assert f" {path.relative_to(folder)} " in notice


def test_embedded_sources_read_and_pickle():
    source = pickle.loads(pickle.dumps(embedded_source("videos", "train")))
    names = [source.describe(index).rsplit("/", 1)[1] for index in range(len(source))]
    sample = source.sample(names.index("tree.mp4"), _rng(), 4, (1, 4))
    assert sample.frames.shape == (4, 144, 192, 3)
    image = embedded_source("images", "heldout").sample(0, _rng())
    assert min(image.frames.shape[1:3]) == 256


def test_a_photograph_is_no_clip():
    with pytest.raises(DataError, match="a photograph has 1 frame, a clip of 4"):
        embedded_source("images", "train").sample(0, _rng(), frames=4)


def test_a_video_is_only_made_smaller():
    path = embedded_files("videos", "heldout")[0]  # 640 x 272
    assert video_source(path, short_side=136).sample(0, _rng(), 2, (1, 1)).frames.shape == (2, 136, 320, 3)
    assert video_source(path, short_side=500).sample(0, _rng(), 2, (1, 1)).frames.shape == (2, 272, 640, 3)


def test_clips_are_the_drawn_frames_of_the_video():
    path = embedded_files("videos", "heldout")[1]
    sample = video_source(path).sample(0, _rng(), 4, (2, 5))
    indices = clip_indices(_rng(), 36, 4, (2, 5), "x")
    with open_video(path) as video:
        np.testing.assert_array_equal(sample.frames, video.read(indices))


def test_clip_strides_and_starts_cover_what_is_possible():
    rng = _rng()
    drawn = [clip_indices(rng, 20, 4, (2, 4), "x") for _ in range(2000)]
    strides = np.array([indices[1] - indices[0] for indices in drawn])
    assert all(len(indices) == 4 for indices in drawn)
    for stride in (2, 3, 4):
        assert np.mean(strides == stride) == pytest.approx(1 / 3, abs=0.05)
        starts = {indices[0] for indices in drawn if indices[1] - indices[0] == stride}
        assert starts == set(range(20 - 3 * stride))
    short = [clip_indices(rng, 8, 4, (2, 4), "x") for _ in range(50)]
    assert {(indices[0], indices[1] - indices[0]) for indices in short} == {(0, 2), (1, 2)}  # 3 and 4 do not fit
    assert {clip_indices(rng, 3, 1, (2, 4), "x")[0] for _ in range(50)} == {0, 1, 2}
    with pytest.raises(DataError, match=r"a\.mp4: has 6 frames, a clip of 4 frames at stride 2 needs 7"):
        clip_indices(rng, 6, 4, (2, 4), "a.mp4")


def test_sources_weigh_the_square_root_of_their_size():
    sources = [embedded_source("images", "train"), embedded_source("images", "heldout")]
    np.testing.assert_allclose(mixture_weights(sources), np.sqrt([15, 5]) / np.sqrt([15, 5]).sum())
    assert mixture_weights(sources, (3, 1)) == (0.75, 0.25)
    with pytest.raises(DataError, match="3 are given for 2 sources"):
        mixture_weights(sources, (1, 1, 1))
    with pytest.raises(DataError, match=r"weights: 0 for source embedded images \(heldout\)"):
        mixture_weights(sources, (1, 0))


def test_clips_at_a_frame_rate_are_spaced_by_time(tmp_path):
    """12.5 frames a second of a video of 30: 2.4 of its frames apart, to the nearest."""
    rng = _rng()
    assert {len(clip_indices(rng, 40, 4, (1, 1), "x", unit=2.4)) for _ in range(5)} == {4}
    spaced = clip_indices(rng, 8, 4, (1, 1), "x", unit=2.4)
    assert spaced == [0, 2, 5, 7]
    with pytest.raises(DataError, match="has 7 frames, a clip of 4 frames at stride 1 needs 8"):
        clip_indices(rng, 7, 4, (1, 1), "x", unit=2.4)

    path = write_clip(tmp_path / "a.mp4", real_frames(0, 40), rate=30)
    frames = video_source(path, frame_rate=12.5).sample(0, _rng(), 4, (1, 1)).frames
    every = video_source(path).sample(0, _rng(), 40, (1, 1)).frames
    start = clip_indices(_rng(), 40, 4, (1, 1), "x", unit=2.4)[0]
    np.testing.assert_array_equal(frames, every[[start, start + 2, start + 5, start + 7]])


def test_heldout_clip_is_spread_over_the_video():
    clip = heldout_clip(8, 64, 96)
    assert clip.shape == (8, 64, 96, 3)
    assert clip.dtype == np.uint8
    with open_video(embedded_files("videos", "heldout")[1]) as video:
        assert video.path.endswith("plant.mp4")
        last = video.read([35])[0]
    crop = last[13:227]  # 320 x 213.3 of 320 x 240, the centre
    expected = np.asarray(Image.fromarray(crop).resize((96, 64), Image.Resampling.BICUBIC))
    assert np.abs(clip[7].astype(int) - expected).mean() < 3
    assert heldout_clip(1, 32, 32, "bicycles.mp4").shape == (1, 32, 32, 3)
    with pytest.raises(DataError, match=r"37 frames were asked for, 1 to 36 can be had"):
        heldout_clip(37, 64, 64)
    with pytest.raises(DataError, match=r"no embedded video 'x\.mp4', expected one of bicycles\.mp4, plant\.mp4"):
        heldout_clip(2, 64, 64, "x.mp4")
