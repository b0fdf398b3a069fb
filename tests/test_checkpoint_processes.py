"""Checkpoints of two processes of which one fails, or alone finds damage."""

import time

import pytest
from fault_cases import finish, pair, read_until, restored

pytestmark = pytest.mark.slow
FIELDS = {"checkpoint__every": 1, "mesh__fsdp": 2}


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_of_one_process_ends_both_soon_and_keeps_what_is_being_saved(tmp_path, culprit):
    processes = pair(tmp_path, FIELDS | {"steps": 100_000, "poison": {"first": {"missing": [[culprit, 8]]}}})
    read_until(processes[0], "saved step 1")
    begun = time.monotonic()
    outputs = finish(*processes, status=1, timeout=60)
    assert time.monotonic() - begun < 15
    assert f"step 8 is missing in process {culprit}" in outputs[culprit]
    assert restored(tmp_path)[0] == 7


def test_damage_that_one_process_finds_puts_the_checkpoint_aside_for_both(tmp_path):
    fields = FIELDS | {"steps": 3}
    finish(*pair(tmp_path, fields))
    checkpoints = tmp_path / "checkpoints"
    written = list((checkpoints / "3" / "state" / "ocdbt.process_1" / "d").iterdir())
    for path in written:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    first, second = finish(*pair(tmp_path, fields), timeout=120)
    assert written
    assert "checkpoints/3 is damaged: process 1: its arrays cannot be read" in first
    assert "going on from step 2" in first
    assert "damaged" not in second
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "3", "3.bad"]
