import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import zlib
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnistream_jax import checkpoint as checkpoint_lib
from omnistream_jax.checkpoint import CheckpointError, CheckpointMismatchError, Checkpoints
from omnistream_jax.utils import agreement
from omnistream_jax.utils.trees import fingerprint, named_leaves

# A read that fails leaves coroutines of Orbax unfinished; their end is told when the garbage is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def collect_garbage():
    yield
    gc.collect()


class Moments(NamedTuple):
    mean: dict
    unused: None


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    moments: tuple
    rng: jax.Array


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "block": {"kernel": jax.random.normal(keys[0], (64, 32)), "bias": jnp.zeros(32).at[3].set(-0.0)},
        "half": jax.random.normal(keys[1], (5, 7), jnp.bfloat16),
        "mask": jnp.array([True, False, True]),
        "bytes": jnp.arange(7, dtype=jnp.uint8),
    }
    moments = (Moments(mean={"kernel": jax.random.normal(keys[2], (64, 32))}, unused=None), None)
    return State(jnp.int32(seed), params, moments, jax.random.key_data(keys[0]))


def abstract(state):
    return jax.eval_shape(lambda: state)


def bits(state):
    return {name: (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in named_leaves(state).items()}


def save_all(directory, steps, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"loss": step / 4})


def restore(directory, state=None, **options):
    with Checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore_latest(abstract(state or make_state()))


def array_files(step_directory):
    """The files of a step that hold array data, the largest first."""
    files = [path for path in step_directory.rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: -path.stat().st_size)


# Fingerprints


def reference_fingerprint(array):
    """The definition of `fingerprint` in plain Python integers."""
    raw = np.asarray(array).astype(np.uint32) if array.dtype == bool else np.asarray(array)
    words = np.frombuffer(raw.tobytes(), f"u{min(raw.dtype.itemsize, 4)}")
    total = 0
    for index, word in enumerate(words.tolist()):
        index = ((index ^ index >> 16) * 0x7FEB352D) % 2**32
        index = ((index ^ index >> 15) * 0x846CA68B) % 2**32
        total += word * ((index ^ index >> 16) | 1)
    return total % 2**32


def test_the_fingerprint_is_its_definition():
    leaves = named_leaves(make_state())
    assert fingerprint(leaves) == {name: reference_fingerprint(leaf) for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int32"])
def test_any_flipped_bit_and_swapped_rows_change_the_fingerprint(dtype):
    random = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(random.integers(0, 100, (16, 9))).astype(dtype))
    before = fingerprint({"x": array})
    for _ in range(50):
        changed = bytearray(array.tobytes())
        changed[random.integers(len(changed))] ^= 1 << random.integers(8)
        assert fingerprint({"x": np.frombuffer(changed, array.dtype).reshape(array.shape)}) != before
    assert fingerprint({"x": array[::-1].copy()}) != before


def test_the_fingerprint_does_not_depend_on_the_sharding():
    program = (
        "import jax, numpy as np, json\n"
        "from omnistream_jax.utils.trees import fingerprint\n"
        "x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)\n"
        "mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ('a', 'b'))\n"
        "specs = [jax.P(), jax.P('a'), jax.P('b', 'a'), jax.P(None, ('a', 'b'))]\n"
        "put = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for spec in specs]\n"
        "print(json.dumps([fingerprint({'x': array})['x'] for array in [x, *put]]))\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 5
    assert len(set(json.loads(result.stdout))) == 1


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two leaves of the tree have the name"):
        named_leaves({"a": {"b": 1}, "a.b": 2})


# Saving and restoring


def test_a_restored_state_has_every_bit_and_the_metadata(tmp_path):
    save_all(tmp_path, [1, 2])
    step, state, metadata = restore(tmp_path)
    assert (step, metadata) == (2, {"loss": 0.5})
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    assert bits(state) == bits(make_state(2))


def test_there_is_nothing_to_restore_in_a_new_directory(tmp_path):
    assert restore(tmp_path / "new") is None


def test_a_save_in_the_background_is_not_touched_by_updates_that_donate(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {"x": jnp.arange(4_000_000, dtype=jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = update(state)
        checkpoints.wait()
        _, restored, _ = checkpoints.restore_latest(abstract(state))
    np.testing.assert_array_equal(restored["x"], np.arange(4_000_000, dtype=np.float32))


def test_the_last_and_every_nth_are_kept(tmp_path):
    save_all(tmp_path, range(5, 36, 5), keep_last=2, keep_every=20)
    assert Checkpoints(tmp_path).steps() == [20, 30, 35]


def test_saving_goes_on_after_a_restore(tmp_path):
    save_all(tmp_path, [1, 2])
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state()))[0] == 2
        checkpoints.save(3, make_state(3))
    assert restore(tmp_path)[0] == 3
    assert Checkpoints(tmp_path).steps() == [2, 3]


def test_part_of_a_checkpoint_can_be_asked_for(tmp_path):
    save_all(tmp_path, [1])
    wanted = {"params": abstract(make_state()).params}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore_latest(wanted, partial=True)
        assert bits(state) == bits({"params": make_state(1).params})
        with pytest.raises(CheckpointMismatchError, match=r"rng: uint32\[2\] in it, not expected"):
            checkpoints.restore_latest(wanted)


def test_another_tree_is_a_mismatch_that_names_every_difference_and_not_damage(tmp_path):
    save_all(tmp_path, [1, 2])
    wanted = make_state()
    wanted.params["block"] = {"kernel": jnp.zeros((64, 16)), "scale": jnp.zeros(3)}
    wanted.params["half"] = wanted.params["half"].astype(jnp.float32)
    with pytest.raises(CheckpointMismatchError) as caught:
        restore(tmp_path, wanted)
    assert str(caught.value).splitlines() == [
        f"checkpoint {tmp_path}/2 does not fit this run:",
        "  params/block/kernel: expected float32[64,16], it holds float32[64,32]",
        "  params/block/scale: expected float32[3], not in it",
        "  params/half: expected float32[5,7], it holds bfloat16[5,7]",
        "  params/block/bias: float32[32] in it, not expected",
    ]
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3.0, "leaf 'x' must be an array, got float"),
        (jax.random.key(0), "leaf 'x' is a PRNG key: save jax.random.key_data"),
        (np.zeros(3, np.float64), "leaf 'x' has type float64"),
        (np.zeros((0, 3), np.float32), r"leaf 'x' of shape \(0, 3\) has no element"),
    ],
)
def test_what_could_not_be_restored_is_not_saved(tmp_path, leaf, message):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(1, {"x": leaf})
    assert os.listdir(tmp_path) == []


def test_metadata_must_be_json_and_steps_new(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="metadata must be JSON values"):
            checkpoints.save(1, make_state(), {"path": tmp_path})
        checkpoints.save(1, make_state())
        with pytest.raises(CheckpointError, match="step 1 is already saved"):
            checkpoints.save(1, make_state())


def test_a_missing_or_wrong_directory_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="missing does not exist"):
        Checkpoints(tmp_path / "missing", read_only=True)
    with pytest.raises(CheckpointError, match="file cannot be used"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(CheckpointError, match="reading only"):
        Checkpoints(tmp_path, read_only=True).save(1, make_state())


def test_a_save_that_cannot_begin_is_told(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
        checkpoints.wait()
        shutil.rmtree(tmp_path)
        tmp_path.write_text("a file where the directory was")
        with pytest.raises(CheckpointError, match=f"step 2 could not be saved in {tmp_path}"):
            checkpoints.save(2, make_state())


# Damage


def flip_a_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(data)


def empty(step_directory):
    shutil.rmtree(step_directory)
    step_directory.mkdir()


def truncate(step_directory):
    path = array_files(step_directory)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def read_metadata(step_directory):
    return (step_directory / "_CHECKPOINT_METADATA").read_text()


DAMAGES = {
    "an empty directory": empty,
    "a truncated array file": truncate,
    "a missing array file": lambda path: array_files(path)[0].unlink(),
    "no commit file": lambda path: (path / "commit_success.txt").unlink(),
    "no commit time": lambda path: (path / "_CHECKPOINT_METADATA").write_text(
        re.sub('"commit_timestamp_nsecs": [0-9]+', '"commit_timestamp_nsecs": null', read_metadata(path))
    ),
    "no metadata": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "no tree": lambda path: shutil.rmtree(path / "state"),
    "the arrays of another step": lambda path: (
        shutil.rmtree(path / "state"),
        shutil.copytree(path.with_name("2") / "state", path / "state"),
    ),
    "another step under its name": lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("2"), path)),
    "changed metadata": lambda path: (path / "_CHECKPOINT_METADATA").write_text(
        read_metadata(path).replace('"loss": 0.75', '"loss": 0.76')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_put_aside_and_the_previous_one_used(tmp_path, caplog, damage):
    save_all(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    step, state, metadata = restore(tmp_path)
    assert (step, metadata) == (2, {"loss": 0.5})
    assert bits(state) == bits(make_state(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3.bad"]
    assert re.search(r"Checkpoint .*/3 is damaged: .*Renamed to 3\.bad", caplog.text)


def test_the_step_put_aside_can_be_saved_again(tmp_path):
    save_all(tmp_path, [1, 2])
    for bad in ("2.bad", "2.bad2"):
        truncate(tmp_path / "2")
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state()))[0] == 1
            checkpoints.save(2, make_state(2))
        assert (tmp_path / bad).is_dir()
    assert restore(tmp_path)[0] == 2


def test_a_reader_beside_the_run_leaves_a_damaged_checkpoint_where_it_is(tmp_path):
    save_all(tmp_path, [1, 2])
    truncate(tmp_path / "2")
    assert restore(tmp_path, read_only=True)[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_if_no_checkpoint_is_whole_the_run_does_not_begin_anew(tmp_path):
    save_all(tmp_path, [1, 2])
    truncate(tmp_path / "1")
    empty(tmp_path / "2")
    for _ in range(2):  # nor when it is started again
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(damaged: 1\.bad, 2\.bad\)"):
            restore(tmp_path)


@pytest.mark.parametrize(
    ("function", "error", "told"),
    [
        ("load", MemoryError("out of memory"), "MemoryError: out of memory"),
        ("load", OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        ("metadata", OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        ("metadata", OSError(errno.EHOSTDOWN, "Host is down"), "Host is down"),
        ("load", ValueError("UNKNOWN: Error reading: gone [os_error_code='116']"), "UNKNOWN: Error reading"),
        ("load", ValueError("ABORTED: Error reading"), "ABORTED: Error reading"),
        ("load", TimeoutError("no answer"), "TimeoutError: no answer"),
    ],
)
def test_a_failing_machine_is_no_damage(tmp_path, monkeypatch, function, error, told):
    save_all(tmp_path, [1, 2])

    def fail(*_, **__):
        raise ValueError("wrapped") from error

    monkeypatch.setattr(f"omnistream_jax.checkpoint.ocp.{function}", fail)
    with pytest.raises(CheckpointError, match=f"2 could not be read: .*{re.escape(told)}"):
        restore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ValueError("DATA_LOSS: bad [os_error_code='5']")]
)
def test_what_the_disk_cannot_read_is_damage(tmp_path, monkeypatch, error):
    save_all(tmp_path, [1, 2])
    load = checkpoint_lib.ocp.load

    def load_but_the_last(path, *arguments, **options):
        if path.name == "2":
            raise error
        return load(path, *arguments, **options)

    monkeypatch.setattr(checkpoint_lib.ocp, "load", load_but_the_last)
    assert restore(tmp_path)[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["1", "2.bad"]


def test_damage_is_told_by_the_first_process_alone(tmp_path, monkeypatch, caplog):
    save_all(tmp_path, [1, 2])
    truncate(tmp_path / "2")
    monkeypatch.setattr(agreement, "jax", types.SimpleNamespace(process_index=lambda: 1, process_count=lambda: 1))
    assert restore(tmp_path, read_only=True)[0] == 1
    assert "damaged" not in caplog.text


def check_flips(tmp_path, positions):
    """Flips one bit in a copy of every file of a step; what is restored must be right, whichever step it is from."""
    original = tmp_path / "original"
    save_all(original, [1, 2])
    files = [path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file()]
    refused = dict.fromkeys(files, 0)
    for file in files:
        size = (original / file).stat().st_size
        for position in sorted(
            {zlib.crc32(f"{file.name}{count}".encode()) % max(size, 1) for count in range(positions)}
        ):
            if size == 0:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            flip_a_bit(copy / file, position)
            step, state, metadata = restore(copy)
            assert bits(state) == bits(make_state(step)), (file, position)
            assert metadata == {"loss": step / 4}, (file, position)
            refused[file] += step == 1
            shutil.rmtree(copy)
    return {str(file): count for file, count in refused.items()}


def test_a_flipped_bit_is_never_restored(tmp_path):
    refused = check_flips(tmp_path, positions=2)
    assert sum(refused.values()) > len(refused) / 2


@pytest.mark.slow
def test_a_flipped_bit_is_never_restored_at_100_positions_of_every_file(tmp_path):
    refused = check_flips(tmp_path, positions=100)
    largest = max((path for path in refused if "/d/" in path), key=refused.get)
    assert refused[largest] > 80, refused


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [cut, os.unlink, lambda path: path.write_bytes(b"")], ids=["cut", "deleted", "empty"]
)
def test_whatever_file_is_cut_or_deleted_what_is_restored_is_right(tmp_path, damage):
    original, refused = tmp_path / "original", 0
    save_all(original, [1, 2])
    files = [path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file()]
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        damage(copy / file)
        step, state, metadata = restore(copy)
        assert bits(state) == bits(make_state(step)), file
        assert metadata == {"loss": step / 4}, file
        refused += step == 1
        shutil.rmtree(copy)
    assert refused > len(files) / 3, "few files matter"


def test_a_process_killed_in_a_save_resumes_from_a_whole_checkpoint(tmp_path):
    program = (
        "import sys, itertools, jax.numpy as jnp\n"
        "from omnistream_jax.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "for step in itertools.count(1):\n"
        "    checkpoints.save(step, {'x': jnp.full((1000, 500), step, jnp.float32)})\n"
        "    if step > 1: print(step - 1, flush=True)\n"  # the one before is on the disk
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if int(line) == 4:
                process.send_signal(signal.SIGKILL)
                break
        saved = max([4, *(int(line) for line in process.stdout.read().split())])
    with Checkpoints(tmp_path) as checkpoints:
        step, state, _ = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((1000, 500), jnp.float32)})
        np.testing.assert_array_equal(state["x"], np.full((1000, 500), step, np.float32))
        checkpoints.save(step + 1, state)
    assert step >= saved
    assert [name for name in os.listdir(tmp_path) if not name.isdigit()] == []
