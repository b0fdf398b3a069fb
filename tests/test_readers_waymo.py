"""Waymo Open: its TFRecord files and messages written byte by byte, read back as the room that the car drives in."""

import functools
import io
import struct
import zlib

import google_crc32c
import numpy as np
import pytest
from PIL import Image
from ray_cases import hit, pinhole_rays, seen
from world_cases import assert_is_world, assert_reprojects, camera_path, rotation

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers import tfrecord
from omnistream_jax.data.readers.waymo import Waymo

HEIGHT, WIDTH = 48, 64
INTRINSICS = np.array([[50.0, 0, 33.5], [0, 52.5, 22], [0, 0, 1]])
LENS = (-0.25, 0.05, 0.004, -0.003, 0.01)  # k1 k2 p1 p2 k3
NO_LENS = (0.0,) * 5

# Waymo's world has x forward, y left, z up, and an origin far away: ours has x right, y down, z forward.
AXES = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
FAR = np.array([1000.0, -500.0, 20.0])  # where the room's origin is
VEHICLE = np.array([-2.0, 0.5, -1.7])  # from there, where the vehicle stands in the first frame
BEAMS = np.deg2rad(np.linspace(-36, 34, 100) + 2 * np.sin(np.linspace(-36, 34, 100)))  # not evenly spread
COLUMNS = 720


def rigid(turn, place):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, place
    return matrix


CAMERA_TO_VEHICLE = rigid(rotation(0.02, -0.03, 0.4), [1.5, 0.1, 2.0])
LASER_TO_VEHICLE = rigid(rotation(0.01, 0.02, -0.7), [1.2, 0.05, 2.3])


# Wire format of protocol buffers, and TFRecord.


def varint(value):
    value &= (1 << 64) - 1  # negative numbers take ten bytes
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def integer(number, value):
    return varint(number << 3) + varint(value)


def nested(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def double(number, value):
    return varint(number << 3 | 1) + struct.pack("<d", value)


def transform(number, matrix):
    return nested(number, b"".join(double(1, value) for value in np.ravel(matrix)))


def compressed(number, array):
    """A MatrixFloat or MatrixInt32, by its type; data packed, dims one by one."""
    if array.dtype.kind == "f":
        data = array.astype("<f4").tobytes()
    else:
        codes = {value: varint(value) for value in np.unique(array).tolist()}
        data = b"".join(map(codes.__getitem__, array.ravel().tolist()))
    shape = b"".join(integer(1, size) for size in array.shape)
    return nested(number, zlib.compress(nested(1, data) + nested(2, shape)))


@functools.cache
def crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ crc_table()[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def masked(data, crc=google_crc32c.value):
    value = crc(data)
    return struct.pack("<I", (value >> 15 | value << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


# The car.


def lens(x, y, coefficients):
    """Where a lens puts a ray of depth 1: OpenCV's formula."""
    k1, k2, p1, p2, k3 = coefficients
    square = x * x + y * y
    radial = 1 + k1 * square + k2 * square**2 + k3 * square**3
    return (
        x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
    )


def without_lens(rays, coefficients):
    x, y = rays[..., 0], rays[..., 1]
    for _ in range(30):
        bent = lens(x, y, coefficients)
        x, y = x + rays[..., 0] - bent[0], y + rays[..., 1] - bent[1]
    return np.stack([x, y, np.ones_like(x)], -1)


def waymo_camera(pose):
    """One of our camera-to-world poses as Waymo has it: other axes of the camera, other axes of the world."""
    right, down, forward = pose[:3, :3].T
    return rigid(AXES @ np.stack([forward, -right, -down], -1), AXES @ pose[:3, 3] + FAR)


def laser_scan(vehicles, turns):
    """Ranges [H, W] and points [H, W, 3] in Waymo's world of a scan whose columns have vehicle poses of their own."""
    azimuth = np.pi - 2 * np.pi * (np.arange(COLUMNS) + 0.5) / COLUMNS
    azimuth = azimuth - np.arctan2(LASER_TO_VEHICLE[1, 0], LASER_TO_VEHICLE[0, 0])
    up, around = np.meshgrid(BEAMS[::-1], azimuth, indexing="ij")  # the first row looks highest
    rays = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], -1)
    mounts = np.array([vehicle @ LASER_TO_VEHICLE for vehicle in vehicles])[turns]
    directions = np.einsum("wij,hwj->hwi", mounts[:, :3, :3], rays)
    times, _ = hit(directions @ AXES, (mounts[:, :3, 3] - FAR) @ AXES)
    return times, mounts[:, :3, 3] + times[..., None] * directions


def projections(points, pose, coefficients):
    """[H, W, 6]: the front camera's pixel first in even columns and second in odd ones, after one of another camera."""
    local = (points - FAR) @ AXES
    local = (local - pose[:3, 3]) @ pose[:3, :3]
    ahead = local[..., 2] > 0.1
    local[~ahead] = 1
    x, y = lens(local[..., 0] / local[..., 2], local[..., 1] / local[..., 2], coefficients)
    inside = ahead & (np.abs(local[..., :2] / local[..., 2:]) < 0.9).all(-1)
    column, row = np.floor(50.0 * x + 33.5).astype(int), np.floor(52.5 * y + 22).astype(int)
    inside &= (column >= 0) & (column < WIDTH) & (row >= 0) & (row < HEIGHT)
    stored = np.zeros((*points.shape[:2], 6), np.int32)
    stored[:, ::2, :3] = np.stack([np.ones_like(row), column, row], -1)[:, ::2]
    stored[:, 1::2, :3] = [2, 5, 7]
    stored[:, 1::2, 3:] = np.stack([np.ones_like(row), column, row], -1)[:, 1::2]
    stored[~inside, :3] = [3, -1, 0]  # seen by no camera that is in the file; a negative number takes ten bytes
    stored[~inside, 3:] = 0
    return stored, np.where(inside, local[..., 2], 0)


def frame_message(t, pose, picture, coefficients, *, cell_poses=True, limits=None):
    stand = rigid(rotation(0.01 * t, 0.0, 0.2), FAR + VEHICLE + [0.1 * t, 0.02 * t, 0])
    later = stand @ rigid(rotation(0.0, 0.01, 0.03), [0.2, 0, 0])
    turns = (np.arange(COLUMNS) > COLUMNS // 2).astype(int) if cell_poses else np.zeros(COLUMNS, int)
    times, points = laser_scan([stand, later], turns)
    stored, z = projections(points, pose, coefficients)
    times[3, :] = -1  # no return
    z[3, :] = 0
    ranges = np.stack([times, times * 0 + 0.5, times * 0, times * 0 - 1], -1).astype(np.float32)
    scan = compressed(2, ranges) + compressed(3, stored)
    if cell_poses:
        cells = [[*angles_of(vehicle), *vehicle[:3, 3]] for vehicle in (stand, later)]
        scan += compressed(4, np.tile(np.array(cells, np.float32)[turns], (len(BEAMS), 1, 1)))
    beams = b"".join(double(2, beam) for beam in BEAMS)
    if limits:
        beams = double(3, limits[0]) + double(4, limits[1])
    image = io.BytesIO()
    Image.fromarray(picture).save(image, "JPEG", quality=95)
    camera_pose = waymo_camera(pose) @ np.linalg.inv(CAMERA_TO_VEHICLE)
    numbers = [50.0, 52.5, 33.5, 22.0, *coefficients]
    cameras, images = b"", b""
    for name in (2, 1):
        calibration = integer(1, name) + b"".join(double(2, value) for value in numbers)
        calibration += transform(3, CAMERA_TO_VEHICLE) + integer(4, WIDTH) + integer(5, HEIGHT)
        cameras += nested(2, calibration)
        data = image.getvalue() if name == 1 else b"another camera's"
        images += nested(4, integer(1, name) + nested(2, data) + transform(3, camera_pose))
    roof = nested(3, integer(1, 1) + beams + transform(5, LASER_TO_VEHICLE))
    other = nested(3, integer(1, 2) + transform(5, np.eye(4)))
    context = nested(1, nested(1, b"a segment") + cameras + other + roof)
    lasers = nested(5, integer(1, 2)) + nested(5, integer(1, 1) + nested(2, scan))
    message = context + integer(2, 1_550_083_467_346_370) + transform(3, stand) + images + lasers
    return message, (z, stored)


def angles_of(matrix):
    """Roll, pitch and yaw of a turn about x, then y, then z."""
    (r00, _, _), (r10, _, _), (r20, r21, r22) = matrix[:3, :3]
    return np.arctan2(r21, r22), -np.arcsin(r20), np.arctan2(r10, r00)


@pytest.fixture(scope="module")
def world():
    return seen(INTRINSICS, camera_path(4), HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def expected(world):
    """The room, in Waymo's axes, from where the vehicle stands first."""
    poses = [rigid(AXES @ pose[:3, :3], AXES @ pose[:3, 3] - VEHICLE) for pose in world.cam_to_world]
    return seen_elsewhere(world, np.array(poses))


def seen_elsewhere(world, poses):
    return type(world)(world.frames, world.depth, world.intrinsics, poses)


def picture_through(world, t, coefficients):
    rays = without_lens(pinhole_rays(INTRINSICS, HEIGHT, WIDTH), coefficients)
    return hit(rays @ world.cam_to_world[t, :3, :3].T, world.cam_to_world[t, :3, 3])[1]


@pytest.fixture(scope="module")
def segment(world):
    """The bytes of a file of four frames through a lens."""
    poses = enumerate(world.cam_to_world)
    frames = [frame_message(t, pose, picture_through(world, t, LENS), LENS)[0] for t, pose in poses]
    return [record(frame) for frame in frames]


def stored(root, *records, folder="individual_files_training"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / folder / "segment-1005081002024129653_5313_150_5333_150_with_camera_labels.tfrecord"
    path.write_bytes(b"".join(records))
    return path


def test_a_segment_is_read_back_without_the_lens(tmp_path, segment, expected):
    path = stored(tmp_path, *segment)
    reader = Waymo.open(tmp_path)
    assert len(reader) == 5
    index = reader.sequences.index(f"individual_files_training/{path.name}/FRONT")
    assert reader.frame_count(index) == 4
    assert reader.describe(index).endswith(f"{path.name}/FRONT")
    assert (reader.info(index).metric, reader.info(index).frames_per_second) == (True, 10.0)
    frames = reader.read(index, range(4))
    # A return lies anywhere within the pixel that is stored for it, and walls are slanted: hence some per cent.
    assert_is_world(frames, expected, colour_error=3, depth_error=6e-2, pose_error=2e-4)
    errors = [np.abs(f.depth / d - 1)[f.valid] for f, d in zip(frames, expected.depth, strict=True)]
    assert np.median(np.concatenate(errors)) < 5e-3
    assert_reprojects(frames)
    np.testing.assert_allclose(frames[3].cam_to_world[:3, 3], [0.74, 0.2, 1.59], atol=1e-5)


@pytest.mark.parametrize("cell_poses", [True, False])
def test_each_pixel_has_the_depth_of_its_nearest_return(tmp_path, world, cell_poses):
    """Without a lens a return stays in the pixel that is stored for it."""
    message, (z, pixels) = frame_message(1, world.cam_to_world[1], world.frames[1], NO_LENS, cell_poses=cell_poses)
    nearest = np.full((HEIGHT, WIDTH), np.inf)
    for depth, cell in zip(z[z > 0], pixels[z > 0], strict=True):
        _, column, row = cell[:3] if cell[0] == 1 else cell[3:]
        nearest[row, column] = min(nearest[row, column], depth)
    stored(tmp_path, record(message))
    frame = Waymo.open(tmp_path).read(0, [0])[0]
    np.testing.assert_array_equal(frame.valid, np.isfinite(nearest))
    assert 0.3 < frame.valid.mean() < 1
    np.testing.assert_allclose(frame.depth[frame.valid], nearest[frame.valid], rtol=2e-4)


def test_beams_are_evenly_spread_where_only_their_limits_are_told(tmp_path, world, monkeypatch):
    low, high, count = -0.6, 0.5, 64
    monkeypatch.setitem(globals(), "BEAMS", low + (np.arange(count) + 0.5) / count * (high - low))
    for name, limits in (("told", None), ("limits", (low, high))):
        message, _ = frame_message(0, world.cam_to_world[0], world.frames[0], NO_LENS, limits=limits)
        stored(tmp_path / name, record(message))
    told, limits = (Waymo.open(tmp_path / name).read(0, [0])[0] for name in ("told", "limits"))
    assert told.valid.mean() > 0.3
    np.testing.assert_allclose(limits.depth, told.depth, rtol=1e-6)


def test_validation_segments_have_a_folder_of_their_own(tmp_path, segment):
    stored(tmp_path, segment[0], folder="individual_files/validation")
    assert len(Waymo.open(tmp_path, "val")) == 5
    with pytest.raises(DataError, match=r"holds no individual_files_training/\*\.tfrecord"):
        Waymo.open(tmp_path)
    with pytest.raises(DataError, match="splits train and val, not 'test'"):
        Waymo.open(tmp_path, "test")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], r"tfrecord: expected a TFRecord file.*cut short within record 1"),
        (lambda data: data + b"\0", r"tfrecord: expected a TFRecord file.*cut short after 2 records"),
        (lambda data: b"\1" + data[1:], r"the checksum of the length of record 0 is wrong"),
        (
            lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            r"checksum of the record at byte 12 is wrong",
        ),
    ],
)
def test_a_damaged_record_is_named(tmp_path, segment, damage, message):
    path = stored(tmp_path)
    path.write_bytes(damage(segment[0] + segment[1]))
    with pytest.raises(DataError, match=message):
        Waymo.open(tmp_path).read(0, [0])


def test_a_message_that_lacks_something_is_refused_by_what_is_missing(tmp_path, segment, world):
    stored(tmp_path, segment[0])
    reader = Waymo.open(tmp_path)
    side = next(index for index in range(5) if reader.sequences[index].endswith("SIDE_LEFT"))
    with pytest.raises(DataError, match=r"SIDE_LEFT, frame 0: expected a Frame message.*camera or laser of number 4"):
        reader.read(side, [0])
    stored(tmp_path / "cut", record(b"\x0a\x7f"))
    with pytest.raises(DataError, match=r"expected a Frame message.*a message is cut short"):
        Waymo.open(tmp_path / "cut").read(0, [0])
    stored(tmp_path / "small", record(frame_message(0, world.cam_to_world[0], world.frames[0][:40], NO_LENS)[0]))
    with pytest.raises(DataError, match="an image of 64 x 40 pixels, calibrated for 64 x 48"):
        Waymo.open(tmp_path / "small").read(0, [0])


def test_checksums_are_those_of_rfc_3720_behind_tfrecords_mask():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    for data in (b"", b"123456789", bytes(range(256)) * 5):
        assert tfrecord.masked_crc32c(data) == struct.unpack("<I", masked(data, crc32c))[0]


def test_numbers_are_read_packed_and_one_by_one():
    values = [0, 1, 127, 128, 300, 2**31 - 1, -1, -(2**31), 5]
    packed = nested(7, b"".join(varint(value) for value in values))
    single = b"".join(integer(7, value) for value in values)
    for data in (packed, single, single + packed):
        found = tfrecord.numbers(tfrecord.message_fields(data), 7, "varint")
        assert found.astype(np.int32).tolist() == values * (len(found) // len(values))
    doubles = nested(2, struct.pack("<2d", 1.5, -2.5)) + double(2, 3.5)
    assert tfrecord.numbers(tfrecord.message_fields(doubles), 2, "<f8").tolist() == [1.5, -2.5, 3.5]
    assert tfrecord.numbers({}, 2, "<f8").size == tfrecord.numbers({}, 2, "varint").size == 0
    assert tfrecord.numbers(tfrecord.message_fields(nested(7, b"")), 7, "varint").size == 0
    for broken in (b"\x80", b"\xff" * 11 + b"\0"):
        with pytest.raises(ValueError, match=r"cut short|more than 64 bits"):
            tfrecord.numbers(tfrecord.message_fields(nested(7, broken)), 7, "varint")


@pytest.mark.parametrize("data", [b"\x08", b"\x08\x80", b"\x0a\x05abc", b"\x09abc", b"\x0b", b"\x00\x01", b"\x80" * 11])
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(ValueError, match=r"cut short|wire type|64 bits"):
        tfrecord.message_fields(data)
