"""What a run tells while it runs: its speed and where the time goes, its programs' memory, profiles, pictures."""

import errno
import gzip
import io
import json
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_cases import toy_config, train_toy
from training_cases import small_config

from omnistream_jax import train as train_lib
from omnistream_jax import watch as watch_lib
from omnistream_jax.flops import Flops
from omnistream_jax.profiling import Profiler
from omnistream_jax.programs import Program, compile_step, table, write_programs
from omnistream_jax.utils.compilation import CompileCounter
from omnistream_jax.utils.metrics import MetricsWriter, read_metrics
from omnistream_jax.utils.speed import Speed, StepClock
from omnistream_jax.watch import Watch, count_inputs

SSL = {"masks": np.zeros(1)}


# The split of the time


def test_every_moment_belongs_to_one_part():
    moments = iter([0.0, 1.0, 1.5, 4.5, 5.0, 7.0])
    clock = StepClock(lambda: next(moments))
    for part in ("data", "other", "device"):
        clock.charge(part)
    assert clock.take() == {"data": 1.0, "other": 0.5, "device": 3.0}
    clock.charge("data")
    clock.charge("data")
    assert clock.take() == {"data": 2.5}, "a new beginning, and nothing lost between"


def test_the_numbers_of_a_speed_are_per_step_and_per_second():
    speed = Speed(4, {"data": 1.0, "device": 6.0, "save": 0.5, "other": 0.5}, {"images": 80, "frames": 16}, 0.4151)
    assert speed.values() == {
        "seconds_data": 0.25,
        "seconds_device": 1.5,
        "seconds_save": 0.125,
        "seconds_other": 0.125,
        "seconds_per_step": 2.0,
        "images_per_second": 10.0,
        "frames_per_second": 2.0,
        "mfu": 0.4151,
    }
    assert str(speed) == "10 images/s, 2 frames/s | MFU 42% | data 12%, device 75%, save 6%"
    unknown = Speed(1, {"data": 0.0, "device": 2.0}, {"images": 5})
    assert "mfu" not in unknown.values()
    assert str(unknown) == "2.5 images/s | data 0%, device 100%"


def test_the_line_and_the_files_tell_the_speed(tmp_path):
    terminal = io.StringIO()
    with MetricsWriter(tmp_path, 40, terminal_names=("loss",), terminal=terminal) as writer:
        writer.write(10, {"loss": 3.0, "koleo": 1.0}, Speed(10, {"data": 1.0, "device": 3.0}, {"frames": 100}, 0.5))
    assert terminal.getvalue().endswith("| 25 frames/s | MFU 50% | data 25%, device 75% | loss 3\n")
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["seconds_per_step"] == 0.4
    assert row["mfu"] == 0.5
    (events,) = (tmp_path / "tensorboard").iterdir()
    for name in (b"frames_per_second", b"seconds_data", b"mfu", b"koleo"):
        assert name in events.read_bytes()


# What is counted


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        ({"global_crops": np.zeros((16, 2, 1, 8, 8, 3)), "local_crops": np.zeros((16, 4, 1, 4, 4, 3))}, (16, 0)),
        ({"global_crops": np.zeros((4, 2, 6, 8, 8, 3)), "local_crops": np.zeros((4, 4, 6, 4, 4, 3))}, (0, 24)),
        ({"frames": np.zeros((2, 5, 8, 8, 3)), "depth": np.zeros((2, 5, 8, 8))}, (0, 10)),
        ({"image": np.zeros((3, 4, 8, 8, 3)), "tokens": np.zeros((3, 7))}, (12, 0)),
    ],
)
def test_a_sample_counts_once_whatever_its_crops(batch, counts):
    assert count_inputs(batch) == counts


def test_an_unknown_batch_is_refused():
    with pytest.raises(ValueError, match="a batch of sound, rate holds neither images nor frames"):
        count_inputs({"sound": 1, "rate": 2})


def test_the_share_of_the_peak_is_what_the_hand_computes(monkeypatch):
    """Two steps of two tasks in 4 s on devices of 100 FLOP/s: (2 x 30 + 10 + 2 x 25) of 400 a device."""
    asked = []

    def flops_of(task, *, learned_tokens, step):
        asked.append((task.name, learned_tokens, step))
        return Flops(20.0, 10.0) if task.name == "caption" else Flops(25.0 if step else 35.0)

    monkeypatch.setattr(watch_lib, "task_flops", flops_of)
    monkeypatch.setattr(watch_lib, "peak_flops", lambda device, dtype: 100.0)
    moments = iter([0.0, 1.0, 4.0])
    tasks = [types.SimpleNamespace(name=name) for name in ("caption", "clip_geometry")]
    watch = Watch(tasks, jnp.bfloat16, 2, StepClock(lambda: next(moments)))
    batches = {
        "caption": {"image": np.zeros((3, 2, 4, 4, 3)), "target_mask": np.arange(10) < 7},
        "clip_geometry": {"frames": np.zeros((2, 5, 4, 4, 3))},
    }
    for step in (1, 2):
        watch.count(step, batches)
    watch.charge("data")
    watch.charge("device")
    speed = watch.speed()
    assert asked == [("caption", 7, 0), ("clip_geometry", None, 0), ("caption", 7, 1), ("clip_geometry", None, 1)]
    assert speed.utilisation == pytest.approx((30 + 35 + 30 + 25) / (4 * 100 * 2))
    assert speed.counts == {"images": 12, "frames": 20}
    assert speed.seconds == {"data": 1.0, "device": 3.0, "save": 0.0, "other": 0.0}


def test_where_the_peak_is_not_known_no_share_is_told():
    watch = Watch([types.SimpleNamespace(name="clip_geometry")], jnp.float32, 1)
    watch.count(1, {"clip_geometry": {"frames": np.zeros((2, 5, 4, 4, 3))}})
    watch.charge("device")
    assert watch.speed().utilisation is None


# Programs


def step_of(names):
    """A step of toy tasks, with its arguments."""

    def make(factor):
        def accumulate(state, gradients, batch):
            loss = factor * (state @ batch["x"]).sum()
            return gradients + jnp.cos(state) * loss, {"loss": loss}

        return jax.jit(accumulate, donate_argnums=1)

    def update(state, gradients, losses):
        return state + gradients * sum(losses), jnp.zeros_like(gradients)

    accumulate = {name: make(factor) for factor, name in enumerate(names, 2)}
    state, gradients = jnp.ones((64, 64)), jnp.zeros((64, 64))
    batches = {name: {"x": jnp.ones((64, 8 * size))} for size, name in enumerate(names, 1)}
    return accumulate, jax.jit(update, donate_argnums=(0, 1)), state, gradients, batches


def test_programs_are_compiled_once_and_then_run():
    accumulate, update, state, gradients, batches = step_of(["caption", "image_ssl"])
    jax.block_until_ready((state, gradients, batches))
    with CompileCounter() as counter:
        programs = compile_step(accumulate, update, state, gradients, batches)
        assert counter.total.programs == 3
        losses = []
        for name, function in accumulate.items():
            gradients, metrics = function(state, gradients, batches[name])
            losses.append(metrics["loss"])
        jax.block_until_ready(update(state, gradients, losses))
        assert counter.total.programs == 3
    assert [program.name for program in programs] == ["caption", "image_ssl", "update"]


def test_the_memory_of_a_program_is_that_of_its_arrays():
    accumulate, update, state, gradients, batches = step_of(["one"])
    batches["one"]["unread"] = jnp.ones(999)
    one, last = compile_step(accumulate, update, state, gradients, batches)
    matrix = 64 * 64 * 4
    assert one.arguments == 2 * matrix + 64 * 8 * 4 + 999 * 4, "what the program does not read lies there all the same"
    assert last.arguments == 2 * matrix + 4
    assert one.outputs < matrix, "the gradients are written where they were; a loss and the table of outputs are left"
    assert last.outputs < matrix
    assert one.memory == one.arguments + one.outputs + one.temporaries + one.code


def test_programs_are_told_in_a_table_and_kept(tmp_path):
    programs = [
        Program("caption", 9.14, 350_000_000, 1_000_000, 1_070_000_000, 0),
        Program("update", 0.2, 5_000_000, 0, 0, 0),
    ]
    lines = table(programs, {"caption": 512.4e9}).splitlines()
    assert lines[0].split() == ["program", "memory", "arguments", "temporary", "model", "GFLOP", "compiled", "in"]
    assert lines[1].split() == ["caption", "1,421.0", "MB", "350.0", "MB", "1,070.0", "MB", "512.4", "9.1", "s"]
    assert lines[2].split() == ["update", "5.0", "MB", "5.0", "MB", "0.0", "MB", "0.2", "s"]
    assert len({len(line) for line in lines}) == 1
    assert len(table([Program("clip_geometry", 1, 1, 1, 1, 1)], {}).splitlines()[1]) == len(lines[0])
    write_programs(tmp_path / "programs.json", programs, {"caption": 512.4e9}, 2)
    kept = json.loads((tmp_path / "programs.json").read_text())
    assert kept["programs"]["caption"]["memory"] == programs[0].memory
    assert kept["programs"]["caption"]["model_flops"] == 512.4e9
    assert (kept["jax"], kept["devices"]) == (jax.__version__, 2)


def test_programs_whose_listing_the_disk_refuses_are_run(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(train_lib, "write_programs", refuse)
    train_toy(toy_config(steps=3), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 3


# Profiles


def traces(folder):
    return sorted(folder.glob("plugins/profile/*/*.trace.json.gz"))


def test_a_profile_of_chosen_steps_lies_in_its_folder(tmp_path):
    said = []
    with Profiler(tmp_path / "profile", start=3, steps=2, say=said.append) as profiler:
        for step in range(1, 7):
            profiler.before(step)
            assert traces(tmp_path / "profile") == [] or step >= 5
            with jax.profiler.StepTraceAnnotation(f"work_of_step_{step}"):
                jnp.sin(jnp.ones(100) * step).block_until_ready()
    (trace,) = traces(tmp_path / "profile")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert [step for step in range(1, 7) if f"work_of_step_{step}" in names] == [3, 4]
    assert said[0] == "profiling steps 3 to 4"
    assert said[1].startswith(f"profile of steps 3 to 4: {tmp_path / 'profile'} (")
    assert len(said) == 2


def test_a_signal_asks_for_a_profile(tmp_path):
    said, before = [], signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path, say=said.append) as profiler:
        profiler.before(1)
        assert said == []
        os.kill(os.getpid(), signal.SIGUSR1)
        profiler.before(2)
        assert said == ["profiling steps 2 to 6"]
        profiler.before(3)
    assert len(traces(tmp_path)) == 1, "what is recorded at the end ends there"
    assert said[1].startswith("profile of steps 2 to 3: ")
    assert signal.getsignal(signal.SIGUSR1) is before


def test_each_of_several_processes_has_a_folder_for_its_profiles(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        said = []
        with Profiler(tmp_path, start=1, steps=1, say=said.append) as profiler:
            profiler.before(1)
        assert len(traces(tmp_path / f"process_{index}")) == 1
        assert f"--logdir {tmp_path};" in said[-1], "which shows those of all"
    assert traces(tmp_path) == []


def test_a_profile_that_cannot_start_stops_nothing(tmp_path):
    said = []
    with (
        Profiler(tmp_path / "first", start=1, steps=5, say=said.append) as first,
        Profiler(tmp_path / "second", start=1, steps=5, say=said.append) as second,
    ):
        first.before(1)
        second.before(1)
        second.before(2)
    assert "no profile: " in said[1]
    assert len(traces(tmp_path / "first")) == 1
    assert not (tmp_path / "second").exists()


def test_outside_the_main_thread_there_is_no_signal_but_a_profile(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)

    def run():
        with Profiler(tmp_path, start=1, steps=1, say=lambda line: None) as profiler:
            profiler.before(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(traces(tmp_path)) == 1
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("fields", "message"), [({"start": 0}, r"profile\.start: .* 1"), ({"steps": -1}, "steps")])
def test_a_profile_that_cannot_be_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Profiler(tmp_path, **fields)


# A run


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory, quick_compilation):
    """A run of one task with a profile and pictures on the way; and how many programs its first step compiled."""
    workdir, compiled = tmp_path_factory.mktemp("watched"), []
    compile_all, write = train_lib.compile_step, MetricsWriter.write
    counter = None

    def compile_and_count(*arguments):
        nonlocal counter
        programs = compile_all(*arguments)
        counter = CompileCounter()
        return programs

    def count_and_write(self, step, *arguments):
        if step == 1:
            compiled.append(counter.total.programs)
            counter.close()
        write(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "compile_step", compile_and_count)
        patch.setattr(MetricsWriter, "write", count_and_write)
        patch.setattr(train_lib, "report", lambda *_: None)  # tests/test_train.py has it
        fields = {"tasks__clip_ssl__weight": 0.0, "self_supervision__gram__weight": 0.0}
        fields |= {"profile__start": 3, "profile__steps": 1}
        config = small_config(steps=5, pictures_every=2, **fields)
        train_lib.train(config, workdir)
    return workdir, compiled


def test_the_first_step_compiles_nothing_that_was_compiled_before_it(watched_run):
    assert watched_run[1] == [0]


def test_the_parts_of_a_step_add_up(watched_run):
    rows = [row for row in read_metrics(watched_run[0] / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 5
    for row in rows:
        parts = [row[f"seconds_{part}"] for part in ("data", "device", "save", "other")]
        assert sum(parts) + row.get("seconds_compile", 0.0) == pytest.approx(row["seconds_per_step"])
        assert row["images_per_second"] == pytest.approx(3 / row["seconds_per_step"])
        assert "frames_per_second" not in row
        assert row["seconds_device"] > 0
    assert ["seconds_compile" in row for row in rows] == [True, False, False, False, False]
    assert rows[3]["seconds_save"] > rows[2]["seconds_save"], "step 3 was saved, in the time of the next line"


def test_the_programs_memory_is_kept(watched_run):
    programs = json.loads((watched_run[0] / "programs.json").read_text())["programs"]
    assert set(programs) == {"image_ssl", "update"}
    assert programs["image_ssl"]["temporaries"] > 0
    # A task leaves the optimiser's moments where they are; the batch comes on top.
    assert programs["image_ssl"]["arguments"] > programs["update"]["arguments"]
    assert programs["image_ssl"]["model_flops"] > 1e6


def test_a_profile_was_left(watched_run):
    assert len(traces(watched_run[0] / "profile")) == 1


def test_pictures_were_drawn_on_the_way(watched_run):
    """At steps 2 and 4; those of the end are the report's."""
    (events,) = (watched_run[0] / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 2
