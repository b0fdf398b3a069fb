"""Ray maps and the cameras that fit them against Depth Anything 3's (golden 07c) and their mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry_cases import check_gradients, compiled
from goldens import load_golden, relative_error
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.cameras import pixel_centres, transform_points, unproject
from omnistream_jax.geometry.rays import camera_from_rays, homography, points_from_rays, ray_map

TOLERANCE = 1e-5
HEIGHT, WIDTH, ROWS, COLUMNS = 24, 40, 6, 9
# Golden 07c has images of 2 x 2.
TO_PIXELS = np.diag([WIDTH / 2, HEIGHT / 2, 1]).astype(np.float32)

# Compiled once for all tests of a shape.
to_rays = compiled(lambda *camera: ray_map(*camera, HEIGHT, WIDTH, ROWS, COLUMNS))
camera = compiled(
    lambda rays, weights, unit_depth=True, iterations=0: camera_from_rays(
        rays, HEIGHT, WIDTH, weights, unit_depth=unit_depth, iterations=iterations
    ),
    static_argnames=("unit_depth", "iterations"),
)
ALIKE = np.ones((2, 3, ROWS, COLUMNS), np.float32)


@pytest.fixture(scope="module")
def golden():
    return load_golden("07c_da3_rays")


@pytest.fixture(scope="module")
def cameras() -> tuple[np.ndarray, np.ndarray]:
    """Poses [2, 3, 4, 4] and intrinsics [2, 3, 3, 3], float32, principal points far off the centre.

    The first turns by 90 degrees, so that the directions in the middle have no depth in the world's frame.
    """
    rng = np.random.default_rng(0)
    pose = np.tile(np.eye(4, dtype=np.float32), (6, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = Rotation.random(6, random_state=0).as_matrix(), rng.normal(size=(6, 3))
    pose[0, :3, :3] = Rotation.from_euler("y", 90, degrees=True).as_matrix()
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (2, 3, 1, 1))
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = rng.uniform(20, 60, (2, 2, 3))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = rng.uniform(5, 30, (2, 3)), rng.uniform(2, 20, (2, 3))
    return pose.reshape(2, 3, 4, 4), intrinsics


@pytest.fixture(scope="module")
def rays(cameras) -> np.ndarray:
    return np.asarray(to_rays(*cameras))


def test_a_camera_that_looks_to_the_right():
    """Turned by 90 degrees, from (1, 2, 3): its axis is the world's x, and what is right of it lies behind."""
    pose = np.array([[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3], [0, 0, 0, 1]], np.float32)
    intrinsics = np.array([[2, 0, 1], [0, 2, 1], [0, 0, 1]], np.float32)
    rays = compiled(lambda *camera: ray_map(*camera, 2, 2))(pose, intrinsics)
    np.testing.assert_allclose(rays[0, 1], [1, 2, 3, 1, -0.25, -0.25], atol=1e-6)
    np.testing.assert_allclose(points_from_rays(rays, np.full((2, 2), 4))[0, 1], [5, 1, 2], atol=1e-6)


def test_rays_and_points_agree_with_depth_anything_3(golden):
    """Whose directions come first."""
    depth = golden.inputs["depth"][..., 0]
    rays = np.asarray(to_rays(golden.inputs["c2w"], TO_PIXELS @ golden.inputs["intrinsics_norm"]))
    theirs = np.concatenate([golden.inputs["camray"][..., 3:], golden.inputs["camray"][..., :3]], axis=-1)
    assert relative_error(rays, theirs) <= TOLERANCE
    assert relative_error(points_from_rays(theirs, depth), golden.outputs["ray_d_plus_o_depth"]) <= TOLERANCE
    assert relative_error(points_from_rays(rays, depth), golden.outputs["pts_world"]) <= TOLERANCE


@pytest.mark.parametrize("unit_depth", [True, False])
def test_cameras_agree_with_depth_anything_3_and_where_it_is_wrong_with_the_truth(golden, unit_depth):
    """It is wrong for principal points off the centre, the second of two clips."""
    directions = np.concatenate([golden.inputs["camray"][..., :3], golden.inputs["offcentre_dirs"]])
    origins = np.concatenate([golden.inputs["camray"][..., 3:]] * 2)
    pose, intrinsics = camera(np.concatenate([origins, directions], axis=-1), ALIKE, unit_depth=unit_depth)
    intrinsics = np.linalg.inv(TO_PIXELS) @ intrinsics
    assert relative_error(pose[:1, :, :3, :3], golden.outputs["R"]) <= TOLERANCE
    assert relative_error(pose[:1, :, :3, 3], golden.outputs["T"]) <= TOLERANCE
    focal = np.stack([intrinsics[:1, :, 0, 0], intrinsics[:1, :, 1, 1]], axis=-1)
    assert relative_error(focal, golden.outputs["focal"]) <= TOLERANCE
    assert relative_error(intrinsics[:1, :, :2, 2], golden.outputs["pp"]) <= TOLERANCE

    truth = golden.inputs["c2w"][..., :3, :3]
    assert relative_error(golden.outputs["offcentre/R"], truth) > 0.05
    assert relative_error(pose[1:, :, :3, :3], truth) <= TOLERANCE
    assert relative_error(intrinsics[1:], golden.inputs["offcentre_intrinsics"]) <= TOLERANCE


def test_the_homography_agrees_with_depth_anything_3(golden):
    """Also beside a target that is false, but has no weight."""
    source, target, weights = (golden.inputs[f"homog_{name}"] for name in ("src", "dst", "w"))
    spoilt, without = target.copy(), weights.copy()
    spoilt[3], without[3] = 9, 0
    found = compiled(homography)(np.stack([source] * 2), np.stack([target, spoilt]), np.stack([weights, without]))
    assert relative_error(found, np.stack([golden.outputs["homography"]] * 2)) <= TOLERANCE


@pytest.mark.parametrize("unit_depth", [True, False])
def test_rays_give_their_camera_back_and_it_gives_the_rays(cameras, rays, unit_depth):
    pose, intrinsics = camera(rays, ALIKE, unit_depth=unit_depth)
    assert relative_error(pose, cameras[0]) <= 2e-5
    assert relative_error(intrinsics, cameras[1]) <= 2e-5
    np.testing.assert_allclose(np.linalg.det(pose[..., :3, :3]), 1, atol=1e-5)
    assert relative_error(to_rays(pose, intrinsics), rays) <= 5e-5


def test_lengths_of_directions_may_mean_nothing(cameras, rays):
    lengths = np.random.default_rng(0).uniform(0.1, 10, (*rays.shape[:-1], 1))
    stretched = np.concatenate([rays[..., :3], rays[..., 3:] * lengths], axis=-1).astype(np.float32)
    pose, intrinsics = camera(stretched, ALIKE, unit_depth=False)
    assert relative_error(pose, cameras[0]) <= 2e-5
    assert relative_error(intrinsics, cameras[1]) <= 2e-5
    assert relative_error(camera(stretched, ALIKE)[0], cameras[0]) > 0.1


def test_points_of_rays_are_unprojected_points(cameras, rays):
    depth = np.random.default_rng(0).uniform(1, 5, (2, 3, ROWS, COLUMNS)).astype(np.float32)

    @compiled
    def both(pose, intrinsics):
        centres = pixel_centres(HEIGHT, WIDTH, ROWS, COLUMNS)
        return points_from_rays(rays, depth), transform_points(pose, unproject(depth, intrinsics, centres))

    points, expected = both(*cameras)
    assert relative_error(points, np.asarray(expected)) <= TOLERANCE


@pytest.mark.parametrize("unit_depth", [True, False])
def test_cells_count_by_their_weight(cameras, rays, unit_depth):
    """The last three columns are noise, or NaN."""
    noisy, weights = rays.copy(), ALIKE.copy()
    noisy[..., 6:, :] = np.random.default_rng(0).normal(size=(2, 3, ROWS, 3, 6))
    assert relative_error(camera(noisy, weights, unit_depth=unit_depth)[0], cameras[0]) > 0.1
    weights[..., 6:] = 1e-7
    assert relative_error(camera(noisy, weights, unit_depth=unit_depth)[0], cameras[0]) <= 1e-4
    noisy[..., 6:, :], weights[..., 6:] = np.nan, 0
    assert relative_error(camera(noisy, weights, unit_depth=unit_depth)[0], cameras[0]) <= 2e-5


def test_reweighting_undoes_noise_in_three_cells_of_ten(cameras, rays):
    rng = np.random.default_rng(0)
    noisy = rays + rng.normal(size=rays.shape).astype(np.float32) * 1e-4
    bad = rng.random(rays.shape[:-1]) < 0.3
    noisy[bad] = rng.normal(size=(bad.sum(), 6))
    plain, robust = camera(noisy, ALIKE)[0], camera(noisy, ALIKE, iterations=10)[0]
    errors = [np.abs(np.asarray(pose) - cameras[0]).max((-1, -2)) for pose in (plain, robust)]
    assert errors[0].min() > 0.1
    assert errors[1].max() <= 1e-2
    # Nothing to tell apart: exact rays of cameras at the origin.
    still = rays * np.array([0, 0, 0, 1, 1, 1], np.float32)
    assert relative_error(camera(still, ALIKE, iterations=10)[1], cameras[1]) <= 2e-5


def test_mirrored_rays_still_give_a_rotation(rays):
    mirrored = rays * np.array([1, 1, 1, -1, 1, 1], np.float32)
    pose, intrinsics = camera(mirrored, ALIKE)
    np.testing.assert_allclose(np.linalg.det(pose[..., :3, :3]), 1, atol=1e-5)
    assert np.all(np.diagonal(intrinsics, axis1=-2, axis2=-1) > 0)


def test_leading_axes_are_a_batch(cameras, rays):
    """Cells count alike where no weights are given."""

    def there_and_back(pose, intrinsics):
        rays = ray_map(pose, intrinsics, HEIGHT, WIDTH, ROWS, COLUMNS)
        return rays, camera_from_rays(rays, HEIGHT, WIDTH, unit_depth=False)

    one_by_one = compiled(jax.vmap(jax.vmap(there_and_back)))(*cameras)
    batched = rays, camera(rays, ALIKE, unit_depth=False)
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4), batched, one_by_one)


def test_gradients_agree_with_finite_differences():
    """Of a symmetric camera at the identity, where singular values are equal, and of noisy rays of another.

    A cell of weight 0 is NaN.
    """
    rng = np.random.default_rng(0)
    pose, intrinsics = np.tile(np.eye(4), (2, 1, 1)), np.tile([[2.0, 0, 2], [0, 2, 2], [0, 0, 1]], (2, 1, 1))
    pose[1, :3, :3], pose[1, :3, 3] = Rotation.random(random_state=0).as_matrix(), rng.normal(size=3)
    intrinsics[1, 0, 2] = 2.7
    weights, mask = np.stack([np.ones((4, 4)), rng.uniform(0.5, 1.5, (4, 4))]), np.ones((2, 4, 4))
    mask[1, 2, 3] = 0

    def fit(rays, weights):
        return [camera_from_rays(rays, 4, 4, weights * mask, unit_depth=each) for each in (True, False)]

    with jax.enable_x64(True):
        rays = np.array(compiled(lambda *camera: ray_map(*camera, 4, 4))(pose, intrinsics))
    rays[1] += 0.05 * rng.normal(size=rays[1].shape)
    rays[mask == 0] = np.nan
    of_rays, of_weights = check_gradients(fit, rays, weights)
    assert np.all(of_rays[mask == 0] == 0)
    assert np.all(of_weights[mask == 0] == 0)


def test_gradients_are_finite_after_reweighting(rays):
    """Of exact rays, all residuals of which are rounding."""
    gradient = compiled(jax.grad(lambda rays: sum(map(jnp.sum, camera_from_rays(rays, HEIGHT, WIDTH, iterations=3)))))
    found = gradient(rays[0, 0])
    assert np.isfinite(found).all()
    assert np.all(np.any(found != 0, axis=(0, 1)))


def test_gradients_of_rays_agree_with_finite_differences(cameras):
    check_gradients(lambda *camera: ray_map(*camera, 4, 4), *(each[:, :1].astype(np.float64) for each in cameras))


def test_what_does_not_fit_is_an_error(rays):
    with pytest.raises(ValueError, match=r"rays: expected shape \[..., 2 or more, 2 or more, 6\]"):
        camera_from_rays(rays[..., :1, :], HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"weights: expected shape \[..., 6, 9\], got \[9, 6\]"):
        camera_from_rays(rays, HEIGHT, WIDTH, np.ones((9, 6)))
    with pytest.raises(ValueError, match="iterations: expected 0, or more with unit_depth, got 2"):
        camera_from_rays(rays, HEIGHT, WIDTH, unit_depth=False, iterations=2)
    with pytest.raises(ValueError, match=r"source: expected shape \[..., 4 or more, 2\], got \[3, 2\]"):
        homography(np.ones((3, 2)), np.ones((3, 2)))
