"""Damaged records: skipped, counted, the same with any workers; and resuming a mixture of all kinds of data."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
from clip_cases import real_frames, write_clip
from PIL import Image
from source_cases import FakeCaptions, FakePosed, small_room, truncated_jpeg, write_tokenizer

from omnistream_jax.data.captions import CaptionData
from omnistream_jax.data.errors import DataError, because
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.posed import PosedData
from omnistream_jax.data.skipped import WINDOW, SkipCounter, first_usable
from omnistream_jax.data.sources import image_source, video_source
from omnistream_jax.data.ssl import SelfSupervisedData

RECORDS, BATCH = 60, 4
PASS = RECORDS // BATCH  # steps
DAMAGED = 3  # 5 % of the records, in each way
STEPS = 60
IMAGE, POSE, FOCAL, DEPTH, TEXT = (
    "image cannot be decoded",
    "pose is not finite",
    "focal length is not positive",
    "depth is empty",
    "caption has no text",
)


def _faults(kinds, seed) -> dict[int, str]:
    """Records that are damaged, side by side or not, as chance will have it."""
    places = np.random.default_rng(seed).permutation(RECORDS)[: DAMAGED * len(kinds)]
    return {int(place): kinds[i % len(kinds)] for i, place in enumerate(places)}


def _photographs(folder):
    pictures = small_room().frames
    for index in range(RECORDS):
        Image.fromarray(pictures[index % len(pictures)]).resize((48, 36)).save(folder / f"{index:02}.jpg")
    for index in (7, 8, 59):  # two in a row, and the last, after which comes the first
        truncated_jpeg(folder / f"{index:02}.jpg")
    return image_source(folder, "photographs")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three kinds of data; 5 % of the records of a source are damaged, each in one of its ways."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "photographs").mkdir()
    broken = truncated_jpeg(folder / "broken.jpg")
    rooms = FakePosed("rooms", RECORDS, _faults(("pose", "focal", "depth", broken), 1))
    walks = FakePosed("walks", RECORDS, _faults(("pose",), 2), ordered=False)
    captions = FakeCaptions("captions", RECORDS, _faults(("text", broken), 3))
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    small = {"global_size": 32, "local_size": 16, "local_crops": 1}
    return {
        "image": SelfSupervisedData((_photographs(folder / "photographs"),), BATCH, **small),
        "posed": PosedData((rooms, walks), BATCH, (1.0, 1.0), frames=3, size=(16, 16)),
        "caption": CaptionData((captions,), BATCH, tokenizer=tokenizer, max_tokens=20, size=16),
        "packed": CaptionData(
            (dataclasses.replace(captions, name="packed"),),
            BATCH // 2,
            tokenizer=tokenizer,
            max_tokens=36,
            captions_per_row=2,
            size=16,
        ),
    }


@pytest.fixture(scope="module")
def reference(tasks):
    """The batches of an undisturbed run, and what it had skipped before each."""
    with build_pipeline(tasks, seed=3) as pipeline:
        skipped, batches = [pipeline.skipped], []
        for _ in range(STEPS):
            batches.append(next(pipeline))
            skipped.append(pipeline.skipped)
    return batches, skipped


def _assert_equal(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for task in theirs:
            assert ours[task].keys() == theirs[task].keys()
            for name in theirs[task]:
                np.testing.assert_array_equal(ours[task][name], theirs[task][name], err_msg=f"{task} {name}")


def _difference(after, before):
    """What was skipped since; counts of 0 left out."""
    left = {}
    for source, reasons in after.items():
        counts = {reason: count - before.get(source, {}).get(reason, 0) for reason, count in reasons.items()}
        if any(counts.values()):
            left[source] = {reason: count for reason, count in counts.items() if count}
    return left


def test_the_counts_are_those_of_the_damaged_records(reference):
    _, skipped = reference
    assert skipped[0] == {}
    posed = dict.fromkeys((POSE, FOCAL, DEPTH, IMAGE), DAMAGED)
    captions = dict.fromkeys((TEXT, IMAGE), DAMAGED)
    assert {name: skipped[PASS][name] for name in ("photographs", "captions", "packed")} == {
        "photographs": {IMAGE: DAMAGED},
        "captions": captions,
        "packed": captions,
    }
    assert {name: skipped[2 * PASS][name] for name in ("rooms", "walks")} == {"rooms": posed, "walks": {POSE: DAMAGED}}
    assert skipped[-1] == {
        "photographs": {IMAGE: 4 * DAMAGED},
        "captions": {reason: 4 * count for reason, count in captions.items()},
        "packed": {reason: 4 * count for reason, count in captions.items()},
        "rooms": {reason: 2 * count for reason, count in posed.items()},
        "walks": {POSE: 2 * DAMAGED},
    }


def test_no_batch_holds_a_damaged_record_and_the_next_one_takes_its_place(tasks, reference):
    batches, _ = reference
    for name in tasks:
        damaged = [{7, 8, 59}] if name == "image" else [set(source.faults) for source in tasks[name].sources]
        drawn = np.concatenate([batch[name]["record"] for batch in batches]).reshape(-1)
        passes = STEPS * BATCH // RECORDS // len(damaged)
        for place, bad in enumerate(damaged):
            first = place * RECORDS
            expected = np.full(RECORDS, passes)
            for index in bad:
                expected[index] -= passes
                replacement = next(i % RECORDS for i in range(index, index + RECORDS) if i % RECORDS not in bad)
                expected[replacement] += passes
            counts = np.bincount(drawn[(drawn >= first) & (drawn < first + RECORDS)] - first, minlength=RECORDS)
            np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("start", "workers"), [(0, 0), (1, 0), (10, 0), (7, 1), pytest.param(9, 4, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_with_the_same_fifty_batches_and_counts(tasks, reference, start, workers):
    batches, skipped = reference
    with build_pipeline(tasks, seed=3, start_step=start, workers=workers) as pipeline:
        resumed = [next(pipeline) for _ in range(50)]
        counts = pipeline.skipped
    _assert_equal(resumed, batches[start : start + 50])
    assert counts == _difference(skipped[start + 50], skipped[start])


def test_two_processes_together_see_what_one_sees(tasks, reference):
    batches, skipped = reference
    steps = 2 * PASS
    parts, counts = [], []
    for index in range(2):
        with build_pipeline(tasks, seed=3, process_index=index, process_count=2) as pipeline:
            parts.append([next(pipeline) for _ in range(steps)])
            counts.append(pipeline.skipped)
    for step in range(steps):
        for task, whole in batches[step].items():
            for name, expected in whole.items():
                union = np.empty_like(expected)
                for index in range(2):
                    union[index::2] = parts[index][step][task][name]
                np.testing.assert_array_equal(union, expected, err_msg=f"{task} {name}")
    assert _difference(skipped[steps], counts[0]) == counts[1]


def test_two_processes_see_every_record_once_in_a_pass():
    whole = PosedData((FakePosed("a", 40), FakePosed("b", 40)), BATCH, (1.0, 1.0), frames=2, size=(4, 4))
    seen = [[], []]
    for index in range(2):
        with build_pipeline({"posed": whole}, seed=8, process_index=index, process_count=2) as pipeline:
            for _ in range(40):
                seen[index].append(next(pipeline)["posed"]["record"])
    for first in (0, 20):
        records = np.concatenate([np.concatenate(part[first : first + 20]) for part in seen])
        assert sorted(records.tolist()) == list(range(80))


def test_truncated_videos_are_skipped(tmp_path):
    whole = write_clip(tmp_path / "00.mp4", real_frames(4, 24))
    for index in range(1, 20):
        shutil.copy(whole, tmp_path / f"{index:02}.mp4")
    (tmp_path / "13.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    small = {"global_size": 32, "local_size": 16, "local_crops": 1, "mask_scheme": "tubes"}
    data = SelfSupervisedData((video_source(tmp_path, "videos"),), 4, frames=2, **small)
    with build_pipeline({"clip": data}, seed=0, prefetch=0) as pipeline:
        records = [next(pipeline)["clip"]["record"] for _ in range(5)]
        assert pipeline.skipped == {"videos": {"video cannot be decoded": 1}}
    assert sorted(np.concatenate(records).tolist()) == sorted([*range(13), 14, *range(14, 20)])


@pytest.mark.parametrize(("share", "limit", "stops"), [(0.4, 0.5, False), (0.6, 0.5, True), (0.4, 0.3, True)])
def test_a_source_that_fails_too_often_stops_the_run_by_name(share, limit, stops):
    faults = dict.fromkeys([*range(int(share * 100)), 99], "pose")
    good, bad = FakePosed("good", 100), FakePosed("bad rooms", 100, faults)
    data = PosedData((good, bad), 10, (1.0, 1.0), frames=2, size=(4, 4))
    with build_pipeline({"posed": data}, seed=1, prefetch=0, max_failed_fraction=limit) as pipeline:
        for _ in range(WINDOW * 2 // 10 - 1):  # half of the draws are of the bad source
            next(pipeline)
        if not stops:
            for _ in range(20):
                next(pipeline)
            return
        message = rf"source bad rooms of task posed: {len(faults)} of its last 100 samples could not be used, at most "
        with pytest.raises(DataError, match=message) as caught:
            next(pipeline)
    assert f"{POSE} ({len(faults)})" in str(caught.value)
    assert "bad rooms/" in str(caught.value).split("The last:")[1]
    assert "good" not in str(caught.value)


def test_a_source_without_one_usable_record_stops_at_once():
    source = FakePosed("all broken", 3, dict.fromkeys(range(3), "focal"))
    message = "source all broken: none of its 3 records can be used; the last error: "
    tasks = {"posed": PosedData((source,), 2, frames=2)}
    with build_pipeline(tasks, seed=1, prefetch=0) as pipeline, pytest.raises(DataError, match=message):
        next(pipeline)


def test_only_bad_data_is_skipped():
    def make(index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first_usable(FakePosed("rooms", 3), 1, make)


def test_reasons_are_kept_between_processes():
    with pytest.raises(DataError) as caught, because("outer"), because("inner"):
        raise DataError("message")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason) == ("message", "inner")
    with pytest.raises(DataError) as caught, because("outer"):
        raise DataError("message", reason="own")
    assert caught.value.reason == "own"


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(DataError, match=r"max_failed_fraction: .* expected a share, 0 to 1"):
        SkipCounter(fraction)
