"""Frames as they come: files as strictly as elsewhere, cameras forgiven, and none kept waiting for silence."""

import contextlib
import functools
import http.server
import socket
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from clip_cases import decode_plainly, real_frames, write_clip

from omnistream_jax.data import live_source
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.frames import TimedFrame, sample_frames
from omnistream_jax.data.live_source import LiveOptions, LiveReader, Source, find_source

HEIGHT, WIDTH, FRAMES = 32, 48, 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", real_frames(0, 40)[:FRAMES])


def options(**changes):
    return LiveOptions(**({"height": HEIGHT, "width": WIDTH, "resize": "stretch"} | changes))


def test_every_frame_is_taken_and_the_reading_waits_for_a_slow_caller(clip, monkeypatch):
    read, decode = [], live_source.decode_item

    def spy(item, frame_options):
        for chunk in decode(item, frame_options):
            read.append(chunk)
            yield chunk

    monkeypatch.setattr(live_source, "decode_item", spy)
    with LiveReader(find_source(str(clip)), options()) as reader:
        frames = iter(reader)
        taken = [next(frames)]
        time.sleep(0.3)
        assert len(read) <= 1 + live_source._AHEAD + 1
        taken += frames
    expected, times = decode_plainly(clip, HEIGHT, WIDTH)
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in taken]), expected)
    np.testing.assert_allclose([frame.time for frame in taken], times, atol=1e-6)
    assert reader.dropped == 0


def test_a_file_in_real_time_comes_when_it_is_due(clip):
    started, arrived = time.monotonic(), []
    with LiveReader(find_source(str(clip)), options(realtime=True)) as reader:
        for frame in reader:
            arrived.append((time.monotonic() - started, frame))
    for seconds, frame in arrived:
        assert seconds >= frame.time
    assert arrived[-1][0] >= (FRAMES - 1) / 25


def test_the_newest_frame_is_the_one_that_is_kept(clip):
    with LiveReader(find_source(str(clip)), options(realtime=True, drop_frames=True)) as reader:
        frames = iter(reader)
        next(frames)
        reader._thread.join(10)  # plays to its end
        (last,) = frames
    assert last.time == pytest.approx((FRAMES - 1) / 25)
    assert reader.dropped == FRAMES - 2


def test_a_frame_turned_in_its_container_is_brought_upright(tmp_path):
    path = write_clip(tmp_path / "a.mp4", real_frames(0, 4))
    plain = decode_plainly(path, HEIGHT, WIDTH)[0]
    turned = tmp_path / "turned.mp4"
    with av.open(str(path)) as source, av.open(str(turned), "w", options={"movflags": "+faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(-90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    expected = np.rot90(plain, -1, axes=(1, 2))
    sizes = {"height": WIDTH, "width": HEIGHT}
    with serve(tmp_path) as address:
        for source in (str(turned), f"{address}/turned.mp4"):
            with LiveReader(find_source(source), options(**sizes)) as reader:
                np.testing.assert_array_equal(np.stack([frame.pixels for frame in reader]), expected)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """The folder over http."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_gives_the_frames_that_the_file_gives(clip):
    with serve(clip.parent) as address:
        for changes in ({}, {"frame_rate": 10.0, "resize": "crop"}):
            both = []
            for source in (str(clip), f"{address}/{clip.name}"):
                with LiveReader(find_source(source), options(**changes)) as reader:
                    both.append(list(reader))
            expected, found = both
            np.testing.assert_array_equal([frame.pixels for frame in found], [frame.pixels for frame in expected])
            np.testing.assert_allclose([frame.time for frame in found], [frame.time for frame in expected], atol=1e-6)
            assert all(frame.captured is not None for frame in found)
    assert len(found) == 5  # of 12 frames at 25 a second, those nearest to 10 a second


@pytest.mark.parametrize("rate", [0.5, 1, 3, 5, 7.5, 10, 12, 24, 25, 30, 60])
def test_sampling_without_waiting_takes_the_nearest_frames(rate):
    frames = [TimedFrame(Fraction(index, 25), 0.0, lambda: None) for index in range(100)]
    nearest = [float(frame.time) for frame in sample_frames(frames, Fraction(rate))]
    sampler = live_source._Sampler(rate)
    taken = [float(frame.time) for frame in frames if sampler.takes(float(frame.time))]
    # At the very end, and where two frames are as near, they may differ by a frame.
    assert abs(len(taken) - len(nearest)) <= 1
    assert all(abs(a - b) <= 0.04 + 1e-9 for a, b in zip(taken, nearest, strict=False))


def test_a_clock_goes_on_where_stamps_are_missing_or_start_anew():
    clock = live_source._Clock()
    arrivals = [100.0, 100.5, 101.0, 101.5, 102.0, 102.5]
    stamps = [7.0, 7.5, 0.0, 0.4, None, 900.0]
    assert [clock(*both) for both in zip(stamps, arrivals, strict=True)] == pytest.approx([0, 0.5, 1.0, 1.4, 1.9, 2.4])


def test_numbers_and_names_mean_webcams_and_addresses_are_taken_as_they_are():
    assert find_source("0") == Source("/dev/video0", "camera", "v4l2")
    assert find_source("/dev/video3") == Source("/dev/video3", "camera", "v4l2")
    assert find_source("rtsp://user@host/x") == Source("rtsp://user@host/x", "camera")
    assert find_source("https://host/x.m3u8") == Source("https://host/x.m3u8", "web")


def test_a_camera_that_is_not_there_is_one_clear_error():
    with LiveReader(find_source("987"), options()) as reader, pytest.raises(DataError, match="/dev/video987: cannot"):
        next(iter(reader))


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_camera_that_never_answers_is_given_up(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = find_source(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/stream")
        started = time.monotonic()
        with LiveReader(source, options(timeout=0.3)) as reader, pytest.raises(DataError, match=r"no answer in 0\.3 s"):
            next(iter(reader))
    assert time.monotonic() - started < 5


def test_a_camera_that_falls_silent_is_given_up_after_its_frames(tmp_path):
    data = write_clip(tmp_path / "a.ts", real_frames(2, 40), g="1").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n" + data)
            done.wait(20)
            connection.close()

        done = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        source = find_source(f"http://127.0.0.1:{server.getsockname()[1]}/a.ts")
        try:
            with LiveReader(source, options(timeout=1.0)) as reader:
                taken = iter(reader)
                frames = [next(taken)]
                time.sleep(1.2)  # the caller's own time is no silence
                with pytest.raises(DataError, match="no answer in 1 s"):
                    frames.extend(taken)
        finally:
            done.set()
            thread.join()
    assert len(frames) >= 30


def test_a_live_source_goes_on_after_damage_and_counts_it(tmp_path):
    path = write_clip(tmp_path / "a.ts", real_frames(2, 40), g="1")  # every frame stands alone
    data, generator = bytearray(path.read_bytes()), np.random.default_rng(0)
    for start in range(len(data) // 3 // 188 * 188, len(data) * 2 // 3, 3 * 188):
        if not data[start + 1] & 0x40:  # no frame begins in this packet of the transport stream
            data[start + 12 : start + 188] = generator.bytes(176)
    path.write_bytes(data)
    with serve(tmp_path) as address, LiveReader(find_source(f"{address}/a.ts"), options()) as reader:
        frames = list(reader)
    assert len(frames) + reader.damaged == 40
    assert 5 <= reader.damaged <= 20
    with LiveReader(find_source(str(path)), options()) as reader, pytest.raises(DataError, match=r"a\.ts"):
        list(reader)
