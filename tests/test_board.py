"""TensorBoard's event files, on good disks and full ones."""

import struct

import numpy as np
import pytest
from fault_cases import fill, mounted_disk
from tensorboardX.proto.event_pb2 import Event

from omnistream_jax.utils.board import Board


def events_in(folder):
    """What TensorBoard reads of a folder's files: whole records, with their step, tags and values."""
    found = []
    for path in sorted(folder.iterdir()):
        data, position = path.read_bytes(), 0
        while position + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, position)
            if position + 16 + size > len(data):
                break
            event = Event.FromString(data[position + 12 : position + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            position += 16 + size
    return found


def test_numbers_and_pictures_are_written_and_earlier_ones_purged(tmp_path):
    board = Board(tmp_path / "board", purge_step=5)
    board.add_scalar("loss", 2.5, 5)
    board.add_image("depth", np.zeros((4, 6, 3), np.uint8), 6)
    board.close()
    assert events_in(tmp_path / "board") == [(5, "loss", 2.5), (6, "depth", 0.0)]
    (path,) = (tmp_path / "board").iterdir()
    assert b"brain.Event:2" in path.read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path / "disk", megabytes=1) as disk:
        yield disk


def test_a_full_disk_is_told_once_and_stops_nobody(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(Board, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr("omnistream_jax.utils.board._FLUSH_SECONDS", 0.0)
    board = Board(small_disk / "board", purge_step=1)
    board.add_scalar("loss", 1.0, 1)
    fill(small_disk, leave=0)
    monkeypatch.setattr(Board, "RETRY_SECONDS", 1_000.0)
    for step in range(2, 2_000):
        board.add_scalar("loss", 1.0, step)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(board, "_next_try", 0.0)
    board.add_scalar("loss", 3.0, 2_000)
    board.close()
    steps = [step for step, _, _ in events_in(small_disk / "board")]
    assert steps[0] == 1
    assert steps[-1] == 2_000
