"""Videos for attentive probes: which frames and views, how they change for training, and the layouts.

tests/data/rand_augment_timm.safetensors: "image" uint8 [20, 26, 3] and "OPERATION/MAGNITUDE/SIGN", what timm 1.0.31
(`AugmentOp(name, prob=1, magnitude=..., hparams={"interpolation": BICUBIC})` of timm/data/auto_augment.py, with the
sign forced through `random.random`) makes of it with Pillow 13, for each of its `_RAND_INCREASING_TRANSFORMS`.
"""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from clip_cases import write_clip
from goldens import REPOSITORY
from probe_cases import RAND_AUGMENT, sampling_of, view_of
from safetensors.numpy import load_file

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.probes import action as videos
from omnistream_jax.data.probes import rand_augment
from omnistream_jax.data.probes.action import ActionData, ActionViews, check_same_names, open_action_videos
from omnistream_jax.data.probes.clip_views import (
    SpatialViews,
    resize_short_side,
    segment_indices,
)
from omnistream_jax.data.probes.colours import DEVIATION, MEAN
from omnistream_jax.data.probes.rand_augment import RandAugment, apply_changes, erase_box, parse_rand_augment
from omnistream_jax.data.probes.world_motion import open_world_motion
from omnistream_jax.ops.images import normalize_frames


def _rng(seed=0):
    return np.random.default_rng(seed)


def _frames(count, height=24, width=32, seed=0):
    return _rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# Which frames


def _expected(frame_count, segments, starts):
    """The protocol's text in exact fractions: 16 frames of a span of 64."""
    rows, part = [], frame_count // segments
    for number in range(segments):
        if part > 64:
            row = [starts[number] + int(Fraction(64 * place, 15)) for place in range(16)]
            row = [min(index, starts[number] + 63) + number * part for index in row]
        else:
            last = min(64, frame_count) - 1
            points = last // 4
            row = [int(Fraction(last * place, points - 1)) if points > 1 else 0 for place in range(points)]
            row = [max(min(index, last - 1), 0) for index in row + [last] * (16 - points)]
            move = (frame_count - 64) // (segments - 1) if frame_count > 64 else 0
            row = [index + number * move for index in row]
        rows.append(row)
    return rows


@pytest.mark.parametrize("segments", [1, 2, 8])
@pytest.mark.parametrize("frame_count", [1, 3, 9, 20, 63, 64, 65, 100, 128, 129, 130, 300, 511, 512, 521, 1000])
def test_frames_are_those_of_the_protocol(frame_count, segments):
    part = frame_count // segments
    for window in ("random", "middle"):
        indices = segment_indices(frame_count, sampling_of(segments, window=window), _rng(frame_count))
        assert indices.shape == (segments, 16)
        starts = indices[:, 0] - part * np.arange(segments)
        if part > 64:
            assert ((starts >= 0) & (starts < part - 64)).all()
        if part > 64 and window == "middle":
            assert (starts == (part - 64) // 2).all()
        np.testing.assert_array_equal(indices, _expected(frame_count, segments, starts.tolist()))
        assert indices.min() >= 0
        assert indices.max() < frame_count


def test_random_windows_reach_every_place_but_the_last():
    rng, sampling = _rng(), sampling_of(1)
    starts = {int(segment_indices(70, sampling, rng)[0, 0]) for _ in range(300)}
    assert starts == set(range(6))  # 70 - 64 = 6 is never drawn, as in the original


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segments": 0}, "segments: 0, expected 1 or more"),
        ({"stride": 0}, "stride: 0, expected 1 or more"),
        ({"window": "first"}, "window: 'first', expected random or middle"),
    ],
)
def test_samplings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        sampling_of(**fields)


# How held-out frames are cut


def test_three_views_lie_evenly_along_the_longer_side():
    for shape in ((2, 16, 41, 3), (2, 41, 16, 3)):
        frames = _rng().integers(0, 256, shape, dtype=np.uint8)
        views = SpatialViews(size=16, views=3).cut(frames)
        assert views.shape == (3, 2, 16, 16, 3)
        for view, start in zip(views, (0, 12, 24), strict=True):  # steps of (41 - 16) // 2
            cut = frames[:, :, start : start + 16] if shape[1] < shape[2] else frames[:, start : start + 16]
            np.testing.assert_array_equal(view, cut)


def test_a_single_view_is_the_centre_of_a_larger_picture():
    views = SpatialViews(size=224, views=1)
    assert views.resized_to == 256
    assert SpatialViews(size=224, views=3).resized_to == 224
    frames = _frames(1, 40, 60)
    view = SpatialViews(size=35, views=1).cut(frames)  # 35 * 256 / 224 = 40: nothing to resize
    np.testing.assert_array_equal(view[0], frames[:, 2:37, 12:47])  # 2.5 and 12.5, to the even one


def test_resizing_is_bilinear_without_smoothing_and_the_long_side_rounded_down():
    frames = _frames(1, 30, 47)
    small = resize_short_side(frames, 10)
    assert small.shape == (1, 10, 15, 3)
    rows, columns = (np.arange(10) + 0.5) * 3 - 0.5, (np.arange(15) + 0.5) * 47 / 15 - 0.5
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    picture = frames[0].astype(float)
    upper = picture[top][:, left] * (1 - right) + picture[top][:, left + 1] * right
    lower = picture[top + 1][:, left] * (1 - right) + picture[top + 1][:, left + 1] * right
    assert np.abs(small[0] - (upper * (1 - down) + lower * down)).max() <= 1
    assert resize_short_side(frames, 30) is frames


# How training clips change


@pytest.mark.parametrize("operation", list(rand_augment.OPERATIONS))
def test_each_operation_agrees_with_timm(operation):
    expected = load_file(REPOSITORY / "tests" / "data" / "rand_augment_timm.safetensors")
    for magnitude in (7.0, 6.3):
        for sign in (1, -1):
            change = (operation, rand_augment.argument(operation, magnitude, float(sign)))
            ours = apply_changes(expected["image"][None], [change])[0]
            np.testing.assert_array_equal(ours, expected[f"{operation}/{magnitude}/{sign}"])
    if operation not in ("auto_contrast", "equalize"):
        assert np.any(ours != expected["image"])


def test_magnitudes_and_operations_are_drawn_as_the_name_says():
    rng, drawn = _rng(), [RAND_AUGMENT.draw(_rng(seed)) for seed in range(2000)]
    counts = np.array([len(changes) for changes in drawn])
    assert counts.max() == 4
    assert counts.mean() == pytest.approx(2.0, abs=0.1)  # each is left out half of the time
    names = [name for changes in drawn for name, _ in changes]
    assert all(names.count(name) == pytest.approx(len(names) / 15, rel=0.25) for name in rand_augment.OPERATIONS)
    turns = np.array([value for changes in drawn for name, value in changes if name == "rotate"])
    assert np.abs(turns).mean() == pytest.approx(21.0, abs=0.3)  # degrees: 0.7 of 30
    assert np.abs(turns).std() == pytest.approx(1.5, abs=0.3)
    assert (turns > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert any(len({name for name, _ in changes}) < len(changes) for changes in drawn)  # with replacement
    assert RandAugment(7.0, 0, 0.5).draw(rng) == ()


def test_all_frames_of_a_clip_change_alike():
    frames = np.repeat(_frames(1), 3, axis=0)
    for seed in range(20):
        changed = apply_changes(frames, RAND_AUGMENT.draw(_rng(seed)))
        assert changed.shape == frames.shape
        assert (changed == changed[:1]).all()


def test_names_of_augmentations():
    assert parse_rand_augment("rand-m7-n4-mstd0.5-inc1") == RandAugment(7.0, 4, 0.5)
    assert parse_rand_augment("") is None
    for name in ("rand-m7-n4", "augmix", "rand-m7-n4-mstd0.5-inc0"):
        with pytest.raises(DataError, match=f"rand_augment: '{name}', expected a name like"):
            parse_rand_augment(name)
    with pytest.raises(DataError, match="expected a magnitude of 0 to 10"):
        parse_rand_augment("rand-m11-n4-mstd0.5-inc1")


def test_erasing_fills_one_box_of_all_frames_with_noise_of_their_own():
    shares = []
    for seed in range(100):
        erased = erase_box(np.full((3, 40, 50, 3), 9.0, np.float32), _rng(seed))
        changed = (erased != 9.0).any(-1)
        assert (changed == changed[:1]).all()
        rows, columns = np.flatnonzero(changed[0].any(1)), np.flatnonzero(changed[0].any(0))
        box = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box != 9.0).all()  # a whole rectangle
        assert np.abs(box[0] - box[1]).max() > 0
        assert box.std() == pytest.approx(1.0, abs=0.15)
        assert 0.25 < len(rows) / len(columns) < 4
        shares.append(changed[0].mean())
    assert 0.015 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.36
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)


def test_a_training_view_of_the_whole_frame_is_the_normalised_frame():
    frames = _frames(2, 20, 20)
    view = view_of(20).draw(frames, _rng())  # a box of the whole area and another aspect does not fit
    assert view.dtype == np.float16
    np.testing.assert_allclose(view, normalize_frames(frames), atol=2e-3)
    mirrored = view_of(20, flip_probability=1.0).draw(frames, _rng())
    np.testing.assert_array_equal(mirrored, view[:, :, ::-1])


def test_training_views_differ_by_the_draw_and_their_frames_are_cut_alike():
    frames = np.repeat(_frames(1, 40, 60), 4, axis=0)
    view = view_of(16, rand_augment=RAND_AUGMENT, scale=(0.08, 1.0))
    drawn = [view.draw(frames, _rng(seed)) for seed in (0, 1, 0)]
    assert drawn[0].shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.any(drawn[0] != drawn[1])
    for one in drawn:
        assert (one == one[:1]).all()
    erased = [dataclasses.replace(view, erase_probability=0.25).draw(frames, _rng(seed)) for seed in range(200)]
    share = np.mean([(one != one[:1]).any() for one in erased])  # the noise alone differs from frame to frame
    assert share == pytest.approx(0.25, abs=0.08)


# The layouts


def _write_lists(folder, train=6, val=3, frames=24):
    """The published lists, and videos whose frames are even in colour: 10 + 20 * class + 4 * number of the frame."""
    for split, count in (("train", train), ("val", val)):
        lines = []
        for number in range(count):
            grey = 10 + 20 * (number % 3)
            clip = [np.full((32, 48, 3), grey + 4 * frame, np.uint8) for frame in range(frames)]
            write_clip(folder / split / f"{number}.mp4", clip, size=(48, 32), rate=8)
            lines.append(f"{split}/{number}.mp4 {number % 3}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def _open(folder, split="train", dataset="ssv2", classes=3, allow_incomplete=True):
    return open_action_videos(folder, dataset, split, classes, allow_incomplete)


def test_lists_name_videos_and_labels_and_clips_hold_the_frames_asked_for(tmp_path):
    source = _open(_write_lists(tmp_path))
    assert [source.label(index) for index in range(len(source))] == [0, 1, 2, 0, 1, 2]
    assert source.classes == ("0", "1", "2")
    assert source.settings()["videos"] == 6
    sampling = sampling_of(2, 4, 2)
    clips = list(source.clips(1, sampling, _rng(3)))
    expected = segment_indices(24, sampling, _rng(3))
    assert [clip.shape for clip in clips] == [(4, 32, 48, 3)] * 2
    shown = (np.stack(clips).mean((2, 3, 4)) - 30) / 4
    assert np.abs(shown - expected).max() < 0.75


def test_batches_are_of_normalised_clips_one_after_the_other(tmp_path):
    source = _open(_write_lists(tmp_path))
    sampling, view = sampling_of(2, 4, 2), view_of(16)
    data = ActionData((source,), 3, sampling=sampling, view=view)
    shuffling = ActionData((source,), 3, sampling=sampling, view=view, shuffle_frames=True)
    with build_pipeline({"probe": data}, seed=1) as pipeline, build_pipeline({"probe": shuffling}, seed=1) as other:
        batch, mixed = next(pipeline)["probe"], next(other)["probe"]
    assert batch["frames"].shape == (3, 8, 16, 16, 3)
    assert batch["frames"].dtype == np.float16
    assert batch["label"].dtype == np.int32
    levels = (batch["frames"].astype(float) * DEVIATION + MEAN).mean((2, 3, 4)) * 255
    numbers = (levels - 10 - 20 * batch["label"][:, None]) / 4
    assert numbers.min() > -0.75
    assert numbers.max() < 23.75
    rising = levels.reshape(3, 2, 4)
    assert (np.diff(rising) > 0).all()
    mixed_levels = mixed["frames"].astype(float).mean((2, 3, 4)).reshape(3, 2, 4)
    assert (np.diff(mixed_levels) < 0).any()  # the frames of a clip, in another order
    np.testing.assert_array_equal(np.sort(mixed_levels), batch["frames"].astype(float).mean((2, 3, 4)).reshape(3, 2, 4))


def test_held_out_samples_never_change_and_shuffling_moves_frames_within_clips_alone(tmp_path):
    source = _open(_write_lists(tmp_path, frames=40), "val")
    sampling, views = sampling_of(2, 4, 3), SpatialViews(size=32, views=3)
    data = ActionViews(source, sampling, views, seed=5)
    sample = data.sample(1)
    assert sample["frames"].shape == (3 * 2 * 4, 32, 32, 3)
    assert sample["frames"].dtype == np.uint8
    np.testing.assert_array_equal(sample["frames"], data.sample(1)["frames"])
    other = ActionViews(source, sampling, views, seed=6).sample(1)["frames"]
    assert np.any(other != sample["frames"])  # the windows are drawn by the seed
    shuffled = ActionViews(source, sampling, views, shuffle_frames=True, seed=5).sample(1)["frames"]
    ours, mixed = (frames.reshape(3, 2, 4, 32, 32, 3).mean((3, 4, 5)) for frames in (sample["frames"], shuffled))
    np.testing.assert_allclose(np.sort(mixed), ours)
    assert np.any(mixed != ours)
    assert (mixed == mixed[:1]).mean() == 1.0  # all views alike: the videos are even in colour
    assert data.settings()["sampling"]["window"] == "random"


def test_published_layouts_are_read_without_lists(tmp_path):
    clip = _frames(6, 32, 48)
    for split in ("train", "val"):
        for name in ("abseiling", "zumba"):
            write_clip(tmp_path / "k400" / split / name / f"{name}_000001_000011.mp4", clip, size=(48, 32))
    train, val = (_open(tmp_path / "k400", split, "k400", 2) for split in ("train", "val"))
    check_same_names(train, val)
    assert train.classes == ("abseiling", "zumba")
    root = tmp_path / "ssv2"
    labels = {"Holding something": "0", "Turning something": "1"}
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "labels.json").write_text(json.dumps(labels))
    for split, number in (("train", 1), ("validation", 3)):
        rows = [{"id": str(number + place), "template": text} for place, text in enumerate(labels)]
        (root / "labels" / f"{split}.json").write_text(json.dumps(rows))
        for row in rows:
            write_clip(root / "20bn-something-something-v2" / f"{row['id']}.webm", clip, "libvpx-vp9", size=(48, 32))
    val = _open(root, "val", "ssv2", 2)
    assert (len(val), val.label(1), val.classes) == (2, 1, tuple(labels))
    assert next(val.clips(0, sampling_of(1, 2, 2), _rng())).shape == (2, 32, 48, 3)


@pytest.mark.parametrize("allow_incomplete", [True, False])
def test_as_many_videos_as_are_published_are_complete_whatever_is_allowed(tmp_path, monkeypatch, allow_incomplete):
    _write_lists(tmp_path, 3, 3, frames=2)
    assert not _open(tmp_path).settings()["complete"]
    monkeypatch.setitem(videos.EXPECTED["ssv2"], "train", 3)
    monkeypatch.setitem(videos.CLASSES, "ssv2", 3)
    settings = _open(tmp_path, allow_incomplete=allow_incomplete).settings()
    assert (settings["videos"], settings["expected_videos"], settings["complete"]) == (3, 3, True)


def test_splits_that_number_their_classes_differently_are_refused(tmp_path):
    clip = _frames(4)
    for split, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            write_clip(tmp_path / split / name / "0.mp4", clip, size=(32, 24))
    train, val = (_open(tmp_path, split, "k400", 3) for split in ("train", "val"))
    with pytest.raises(DataError, match=r"have other classes, such as a, c; expected the same"):
        check_same_names(train, val)


def test_data_that_do_not_fit_are_refused_in_one_message(tmp_path):
    folder = _write_lists(tmp_path, 3, 2, frames=2)
    with pytest.raises(
        DataError, match=r"train\.csv: 3 videos of 3 classes, expected 168,913 videos of 174 classes; all"
    ):
        _open(folder, classes=174, allow_incomplete=False)
    with pytest.raises(DataError, match=r"val\.csv: 2 videos of 2 classes, expected 24,777 videos of 174 classes; all"):
        _open(folder, "val", allow_incomplete=False)  # fewer classes of ours leave what is published as it is
    with pytest.raises(DataError, match=r"train\.csv: 1 labels are not below 2; .*2\.mp4 has 2"):
        _open(folder, classes=2)
    with pytest.raises(DataError, match="dataset: 'ucf101', expected one of k400, ssv2"):
        _open(folder, dataset="ucf101")
    (folder / "val.csv").write_text("val/0.mp4 0\nval/gone.mp4 1\n")
    broken = ActionViews(_open(folder, "val"), sampling_of(1, 2, 1), SpatialViews(16, 1))
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such video file"):
        broken.sample(1)


def test_rendered_videos_show_the_whole_motion():
    source = open_world_motion("heldout", 22, frames=8, size=32, seed=0)
    assert sorted(source.label(index) for index in range(11)) == list(range(11))
    sample = ActionViews(source, sampling_of(1, 8, 1), SpatialViews(32, 1, 32)).sample(3)
    np.testing.assert_array_equal(sample["frames"], source.videos.clip(3).images)
    assert sample["label"] == source.label(3)
    with pytest.raises(DataError, match="2 segments of 8 frames, expected 1 of 8"):
        next(source.clips(0, sampling_of(2, 8, 1), _rng()))
