"""The growing point cloud against a slow reference, within its bound, and on rooms whose geometry is known."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.world import WorldClips
from omnistream_jax.reconstruction.point_cloud import VoxelCloud, unproject


def reference(batches, voxel):
    """One point for each voxel: {voxel: mean}, colours behind the positions, weighted by confidence; all in one go."""
    members = {}
    for points, colours, confidence in batches:
        for point, colour, weight in zip(points.tolist(), colours.tolist(), confidence.tolist(), strict=True):
            place = tuple(int(np.floor(value / voxel)) for value in point)
            members.setdefault(place, []).append((weight, [*point, *colour]))
    means = {}
    for place, inside in members.items():
        weights = np.array([weight for weight, _ in inside])
        means[place] = weights @ np.array([values for _, values in inside]) / weights.sum()
    return means


def random_batches(rng, count, size, spread=1.0):
    return [
        (
            rng.normal(0, spread, (size, 3)),
            rng.integers(0, 256, (size, 3), dtype=np.uint8),
            rng.uniform(0.5, 4, size),
        )
        for _ in range(count)
    ]


def assert_holds(cloud, expected):
    """The cloud's points, whatever their order, are the reference's."""
    assert len(cloud) == len(cloud.points) == len(cloud.colours) == len(expected)
    points, means = cloud.points, np.array([expected[place] for place in sorted(expected)])
    np.testing.assert_allclose(points, means[:, :3], rtol=1e-6, atol=1e-6)  # the cloud's order is that of the voxels
    assert np.abs(cloud.colours - means[:, 3:]).max() <= 0.5 + 1e-9
    assert points.dtype == np.float32
    assert cloud.colours.dtype == np.uint8


def test_a_voxel_holds_the_weighted_mean_of_its_points():
    batches = random_batches(np.random.default_rng(0), 5, 400)
    cloud = VoxelCloud(0.3, 10_000)
    for batch in batches:
        cloud.add(*batch)
    expected = reference(batches, 0.3)
    assert len(expected) < 0.7 * 2000  # many voxels hold several points
    assert_holds(cloud, expected)


def test_beyond_the_bound_voxels_double_as_if_they_had_been_large_from_the_start():
    batches = random_batches(np.random.default_rng(1), 8, 300)
    cloud = VoxelCloud(0.02, 500)
    for batch in batches:
        cloud.add(*batch)
        assert len(cloud) <= 500
    ratio = np.log2(cloud.voxel / 0.02)
    assert ratio == round(ratio) >= 2
    expected = reference(batches, cloud.voxel)
    assert_holds(cloud, expected)
    assert len(reference(batches, cloud.voxel / 2)) > 500  # no larger than need be


def test_without_confidence_all_points_count_alike():
    points = np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [0.1, 0.4, 0.1], [-0.1, 0.1, 0.1]])
    colours = np.array([[0, 0, 0], [30, 0, 0], [60, 9, 0], [255, 255, 255]], np.uint8)
    cloud = VoxelCloud(0.5, 8)
    cloud.add(points, colours)
    np.testing.assert_allclose(cloud.points, [[-0.1, 0.1, 0.1], [0.5 / 3, 0.2, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(cloud.colours, [[255, 255, 255], [30, 3, 0]])


def test_a_long_walk_stays_within_the_bound():
    """300 frames of a camera that goes on and on: 900,000 points."""
    rng = np.random.default_rng(2)
    cloud, sizes = VoxelCloud(0.05, 5000), []
    for frame in range(300):
        points = rng.uniform(-1, 1, (3000, 3)) + 0.1 * frame * np.eye(3)[0]
        cloud.add(points, np.full((3000, 3), 7, np.uint8))
        sizes.append(len(cloud))
    assert max(sizes) <= 5000
    assert min(sizes[50:]) > 5000 / 9  # doubling merges at most eight into one
    low, high = cloud.points.min(0), cloud.points.max(0)
    assert low[0] < -0.5
    assert high[0] > 29.9  # nothing has been forgotten
    assert (cloud.colours == 7).all()


def test_the_smallest_bound_ends_at_the_eight_voxels_around_the_origin():
    cloud = VoxelCloud(1e-3, 8)
    cloud.add(np.random.default_rng(3).normal(size=(2000, 3)), np.zeros((2000, 3), np.uint8))
    assert len(cloud) == 8


def test_what_is_no_point_is_left_out_and_counted():
    points = np.zeros((7, 3))
    points[0, 1], points[1, 2], points[2, 0] = np.nan, np.inf, -np.inf
    points[5] = 2.0**20 + 0.5  # the first voxel beyond the reach
    points[6, 0] = -(2.0**20)  # the last one within it
    confidence = np.array([1, 1, 1, np.nan, 0, 1, 1])
    cloud = VoxelCloud(1.0, 100)
    cloud.add(points, np.zeros((7, 3), np.uint8), confidence)
    assert (cloud.unusable, cloud.too_far) == (5, 1)
    np.testing.assert_array_equal(cloud.points, points[6:])


def test_nothing_to_add_changes_nothing():
    cloud = VoxelCloud(1.0, 8)
    nothing = np.empty((0, 3), np.float32), np.empty((0, 3), np.uint8)
    cloud.add(*nothing)
    assert len(cloud.points) == len(cloud.colours) == 0
    cloud.add(np.ones((1, 3)), np.ones((1, 3), np.uint8))
    cloud.add(*nothing)
    assert len(cloud) == 1


@pytest.mark.parametrize(
    ("voxel", "max_points", "field"), [(0, 100, "voxel"), (np.nan, 100, "voxel"), (np.inf, 9, "voxel"), (1, 7, "max_p")]
)
def test_arguments_out_of_range_are_named(voxel, max_points, field):
    with pytest.raises(DataError, match=f"^{field}"):
        VoxelCloud(voxel, max_points)


@pytest.mark.parametrize(
    ("points", "colours", "confidence", "named"),
    [
        ((4, 2), (4, 3), (4,), "points"),
        ((4, 3), (5, 3), (4,), "colours"),
        ((4, 3), (4, 3), (3,), "confidence"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(points, colours, confidence, named):
    with pytest.raises(ValueError, match=named):
        VoxelCloud(1.0, 8).add(np.zeros(points), np.zeros(colours, np.uint8), np.ones(confidence))
    with pytest.raises(ValueError, match="uint8"):
        VoxelCloud(1.0, 8).add(np.zeros((4, 3)), np.zeros((4, 3)), np.ones(4))


def test_a_pixel_goes_through_its_centre():
    """By hand: a camera at (10, 20, 30) that looks along the world's x; f = 2, principal point (2, 1)."""
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # its right is -y, its down -z, its forward x
    pose[:3, 3] = 10, 20, 30
    intrinsics = np.array([[2.0, 0, 2], [0, 2, 1], [0, 0, 1]])
    depth = np.full((3, 5), 4.0)
    depth[2, 4] = np.nan
    points = unproject(depth, intrinsics, pose)
    np.testing.assert_allclose(points[0, 0], [14, 20 + 4 * 0.75, 30 + 4 * 0.25])  # centre at (0.5, 0.5)
    np.testing.assert_allclose(points[1, 4], [14, 20 - 4 * 1.25, 30 - 4 * 0.25])
    assert np.isnan(points[2, 4]).all()
    np.testing.assert_array_equal(unproject(depth, intrinsics, pose, stride=2), points[::2, ::2])


@pytest.fixture(scope="module")
def room():
    return WorldClips("heldout", 8).clip(0)


def static_points(clip, frame, pose=None):
    """Points and colours of the room and of what stands still in it."""
    moving = clip.ids[frame] == clip.scene.mover + 1
    pose = clip.cam_to_world[frame] if pose is None else pose
    points = unproject(clip.depth[frame], clip.intrinsics, pose)
    return points[~moving], clip.images[frame][~moving]


def test_points_of_different_frames_of_a_room_coincide(room):
    """A point of the last frame that the first one sees as well lies within a voxel's diagonal of the first's."""
    voxel, last = 0.2, len(room.depth) - 1
    cloud = VoxelCloud(voxel, 100_000)
    cloud.add(*static_points(room, 0))
    points, _ = static_points(room, last)
    camera = (points - room.cam_to_world[0, :3, 3]) @ room.cam_to_world[0, :3, :3]
    pixels = camera @ room.intrinsics.T
    inside = (camera[:, 2] > 0) & ((np.abs(pixels[:, :2] / pixels[:, 2:] - 48) < 46).all(1))
    columns, rows = (pixels[inside, :2] / pixels[inside, 2:]).astype(int).T
    seen = np.abs(room.depth[0][rows, columns] / camera[inside, 2] - 1) < 0.02  # not hidden in the first frame
    assert seen.sum() > 0.5 * len(points)
    distance, _ = cKDTree(cloud.points).query(points[inside][seen])
    assert distance.max() < voxel * np.sqrt(3)


def test_a_room_seen_again_does_not_grow_the_cloud(room):
    """16 frames with their poses: 1.3 times the points of one frame; with poses inverted, far more than that."""

    def size(poses, frames=16):
        cloud = VoxelCloud(0.2, 100_000)
        for frame in range(frames):
            cloud.add(*static_points(room, frame, poses[frame]))
        return len(cloud)

    true = room.cam_to_world.astype(np.float64)
    one, right, wrong = size(true, 1), size(true), size(np.linalg.inv(true))
    assert right < 1.45 * one
    assert wrong > 1.5 * right
