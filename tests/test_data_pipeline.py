"""Batches depend on (seed, step) alone: resuming, workers, processes and other tasks change nothing."""

import numpy as np
import pytest
from PIL import Image

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.sources import embedded_source, image_source, video_source
from omnistream_jax.data.ssl import SelfSupervisedData


def _images(**changes) -> SelfSupervisedData:
    sources = (embedded_source("images", "train"), embedded_source("images", "heldout"))
    options = {"global_batch_size": 4, "global_size": 64, "local_size": 32, "gram_size": 96}
    return SelfSupervisedData(sources=sources, **{**options, **changes})


def _clips(**changes) -> SelfSupervisedData:
    options = {"global_batch_size": 2, "frames": 3, "stride": (1, 3), "mask_scheme": "tubes"}
    options |= {"global_size": 64, "local_size": 32, "local_crops": 3}
    return SelfSupervisedData(sources=(embedded_source("videos", "train"),), **{**options, **changes})


TASKS = {"image": _images(), "clip": _clips()}


def _steps(count: int, tasks=TASKS, **options) -> list:
    with build_pipeline(tasks, seed=options.pop("seed", 3), **options) as pipeline:
        return [next(pipeline) for _ in range(count)]


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for task in theirs:
            assert ours[task].keys() == theirs[task].keys()
            for name in theirs[task]:
                np.testing.assert_array_equal(ours[task][name], theirs[task][name], err_msg=f"{task} {name}")


def test_a_step_has_the_shapes_of_the_schema():
    (step,) = _steps(1)
    shapes = {task: {name: (value.shape, value.dtype.name) for name, value in step[task].items()} for task in step}
    assert shapes == {
        "image": {
            "global_crops": ((4, 2, 1, 64, 64, 3), "uint8"),
            "local_crops": ((4, 2, 1, 32, 32, 3), "uint8"),
            "gram_crops": ((4, 2, 1, 96, 96, 3), "uint8"),
            "masks": ((4, 2, 1, 4, 4), "bool"),
            "record": ((4,), "int64"),
        },
        "clip": {
            "global_crops": ((2, 2, 3, 64, 64, 3), "uint8"),
            "local_crops": ((2, 3, 3, 32, 32, 3), "uint8"),
            "masks": ((2, 2, 3, 4, 4), "bool"),
            "record": ((2,), "int64"),
        },
    }
    assert (step["image"]["masks"].any(axis=(2, 3, 4)).sum()) == 4  # half of the 8 global crops
    assert step["clip"]["masks"].any(axis=(3, 4)).all()


def test_resuming_gives_the_same_batches():
    _assert_equal(_steps(3, start_step=2), _steps(5)[2:])


def test_prefetching_changes_nothing():
    _assert_equal(_steps(3, prefetch=0), _steps(3, prefetch=4))


def test_the_seed_and_the_step_change_the_batches():
    first, second = _steps(2)
    (other,) = _steps(1, seed=4)
    for batch in (second, other):
        for task in TASKS:
            assert not np.array_equal(batch[task]["global_crops"], first[task]["global_crops"])
            assert not np.array_equal(batch[task]["masks"], first[task]["masks"])


def test_two_workers_give_the_same_batches_from_any_step():
    _assert_equal(_steps(3, start_step=1, workers=2, prefetch=1), _steps(4)[1:])


@pytest.mark.slow
def test_one_worker_gives_the_same_batches():
    _assert_equal(_steps(4, workers=1), _steps(4))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_union_over_processes_is_the_global_batch(processes):
    tasks = {"image": _images(), "clip": _clips(global_batch_size=4)}
    whole = _steps(2, tasks)
    parts = [_steps(2, tasks, process_index=index, process_count=processes) for index in range(processes)]
    for step in range(2):
        for task in tasks:
            for name, expected in whole[step][task].items():
                union = np.empty_like(expected)
                for index in range(processes):
                    union[index::processes] = parts[index][step][task][name]
                np.testing.assert_array_equal(union, expected, err_msg=f"{task} {name}")


def test_a_task_does_not_depend_on_the_others():
    alone = _steps(2, {"clip": TASKS["clip"]})
    _assert_equal(alone, [{"clip": step["clip"]} for step in _steps(2)])


def test_records_name_their_files(tmp_path):
    for name, value in (("a.png", 10), ("b.png", 60), ("c.png", 200)):
        folder = tmp_path / ("first" if name == "a.png" else "second")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (value,) * 3).save(folder / name)
    sources = (image_source(tmp_path / "first"), image_source(tmp_path / "second"))
    data = SelfSupervisedData(sources, 16, global_size=32, local_size=16, gram_size=32)
    with build_pipeline({"image": data}, seed=0) as pipeline:
        batches = next(pipeline)
        names = pipeline.describe(batches)["image"]
    values = {
        str(tmp_path / "first/a.png"): 10,
        str(tmp_path / "second/b.png"): 60,
        str(tmp_path / "second/c.png"): 200,
    }
    assert set(names) == set(values)
    seen = batches["image"]["gram_crops"][:, 0, 0, 0, 0, 0]
    assert seen.tolist() == [values[name] for name in names]


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_sources_come_in_their_shares_and_every_record_as_often(weights):
    data = _images(weights=weights)
    mixture = data._mixture(seed=5)
    records = np.array([mixture[index] for index in range(4000)])
    expected = 15**0.5 / (15**0.5 + 5**0.5) if weights is None else 0.25
    assert (records < 15).mean() == pytest.approx(expected, abs=0.01)  # Grain rounds weights to 1 %
    for first, count in ((0, 15), (15, 5)):
        own = records[(records >= first) & (records < first + count)]
        passes = own[: len(own) // count * count].reshape(-1, count)
        np.testing.assert_array_equal(
            np.sort(passes, axis=1), np.tile(np.arange(first, first + count), (len(passes), 1))
        )
        assert len(np.unique(passes, axis=0)) > 60  # another order in every pass


def test_large_sources_are_shuffled_in_passes_too(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{index}.png" for index in range(5000)))
    mixture = SelfSupervisedData((image_source(tmp_path / "list.txt"),), 2)._mixture(seed=6)
    passes = np.array([mixture[index] for index in range(10000)]).reshape(2, 5000)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(5000), (2, 1)))
    assert (passes[0] != np.arange(5000)).mean() > 0.99
    assert (passes[0] != passes[1]).mean() > 0.99


@pytest.mark.parametrize("options", [{"prefetch": 0}, {"prefetch": 2}, {"workers": 1, "prefetch": 1}])
def test_an_unreadable_sample_stops_with_its_name(tmp_path, options):
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    data = SelfSupervisedData((video_source(tmp_path),), 2, frames=2, mask_scheme="tubes")
    with build_pipeline({"clip": data}, seed=0, **options) as pipeline, pytest.raises(DataError) as caught:
        next(pipeline)
    assert f"{tmp_path}/broken.mp4: expected a video file" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _images(global_size=40), "global_size: 40, expected a positive multiple of patch_size 16"),
        (lambda: _images(local_size=8), "local_size: 8, expected"),
        (lambda: _clips(gram_size=64), "gram_size: 64, expected None for clips"),
        (lambda: _images(frames=2), r"frames: 2, but source embedded images \(train\) has 1 frame"),
        (lambda: _images(mask_scheme="boxes"), "mask_scheme: 'boxes', expected blocks or tubes"),
        (lambda: _clips(mask_probability=0.5), "mask_probability: 0.5, expected None"),
        (lambda: _clips(mask_ratio=(0.1, 0.2)), "mask_ratio: .*expected None"),
        (lambda: _images(mask_probability=1.5), "mask_probability: 1.5, expected 0 to 1"),
        (lambda: _images(mask_ratio=(0.5, 0.1)), "mask_ratio: "),
        (lambda: _clips(stride=(0, 2)), "stride: "),
        (lambda: _images(global_batch_size=0), "global_batch_size: 0, expected 1 or more"),
        (lambda: _images(weights=(1.0,)), "weights: 1 are given for 2 sources"),
        (lambda: SelfSupervisedData((), 2), "sources: "),
        (lambda: build_pipeline({}, seed=0), "tasks: none are given"),
        (lambda: build_pipeline(TASKS, seed=-1), "seed: -1"),
        (lambda: build_pipeline(TASKS, seed=0, process_index=2, process_count=2), "process_index: 2, expected 0 to 1"),
        (lambda: build_pipeline(TASKS, seed=0, workers=1, prefetch=0), "prefetch: 0"),
        (lambda: build_pipeline(TASKS, seed=0, process_count=3), "global_batch_size: 4 is no multiple of the 3"),
    ],
)
def test_settings_that_do_not_fit_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_block_masks_are_repeated_over_the_frames_of_a_clip():
    data = _clips(mask_scheme="blocks", mask_probability=1.0, mask_ratio=(0.5, 0.5))
    masks = data.dataset(0, 0, 1)[0]["masks"]
    assert (masks.sum(axis=(3, 4)) == 8).all()
    np.testing.assert_array_equal(masks, np.repeat(masks[:, :, :1], 3, axis=2))
