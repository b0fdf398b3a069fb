"""Umeyama and the depth fits: against hand-made transforms, SciPy and plain formulas, in JAX and in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize_scalar
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.alignment import apply_similarity, fit_scale, fit_scale_and_shift, umeyama


def similar_points(batch=(), count=20, noise=0.0, seed=0):
    """Source, target = scale * rotation @ source + translation (+ noise), and the three, in float64."""
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(*batch, count, 3)) + 3
    scale = generator.uniform(0.2, 5, batch)
    rotation = Rotation.random(int(np.prod(batch)), rng=generator).as_matrix().reshape(*batch, 3, 3)
    translation = generator.normal(size=(*batch, 3))
    target = scale[..., None, None] * np.einsum("...ij,...nj->...ni", rotation, source) + translation[..., None, :]
    return source, target + noise * generator.normal(size=target.shape), (scale, rotation, translation)


def compiled(xp, function):
    """JAX compiles a whole function sooner than its operations one by one."""
    return jax.jit(function) if xp is jnp else function


def test_numpy_recovers_a_batch_of_transforms_in_float64():
    source, target, truth = similar_points((2, 3))
    found = umeyama(source, target)
    for got, expected in zip(found, truth, strict=True):
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(apply_similarity(found, source), target, atol=1e-12)


def test_jax_recovers_a_batch_of_transforms_under_jit():
    source, target, truth = similar_points((2, 3))
    found = jax.jit(umeyama)(jnp.asarray(source, jnp.float32), jnp.asarray(target, jnp.float32))
    for got, expected in zip(found, truth, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    moved = apply_similarity(found, jnp.asarray(source, jnp.float32))
    np.testing.assert_allclose(moved, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rotation_is_scipys(weighted):
    source, target, _ = similar_points(noise=0.5, seed=1)
    weights = np.random.default_rng(2).uniform(0.1, 2, 20) if weighted else np.ones(20)
    mean = [np.average(points, axis=0, weights=weights) for points in (source, target)]
    expected, _ = Rotation.align_vectors(target - mean[1], source - mean[0], weights=weights)
    found = umeyama(source, target, weights if weighted else None, with_scale=False)
    np.testing.assert_allclose(found.rotation, expected.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(found.translation, mean[1] - expected.apply(mean[0]), atol=1e-12)
    assert found.scale == 1


def test_weights_leave_outliers_out():
    source, target, truth = similar_points(seed=3)
    target[:5] += 100
    weights = np.r_[np.zeros(5), np.ones(15)]
    for got, expected in zip(umeyama(source, target, weights), truth, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_mirrored_target_gets_the_best_proper_rotation(xp):
    source, _, _ = similar_points(seed=4)
    target = source * [1, 1, -1]
    found = compiled(xp, umeyama)(xp.asarray(source), xp.asarray(target))
    assert np.linalg.det(found.rotation) == pytest.approx(1, abs=1e-5)
    expected, _ = Rotation.align_vectors(target - target.mean(0), source - source.mean(0))
    np.testing.assert_allclose(found.rotation, expected.as_matrix(), atol=1e-4)
    # The scale of eq. 42, with the smallest singular value subtracted, is the best for that rotation.
    centred, goal = source - source.mean(0), target - target.mean(0)
    best = np.sum(goal * expected.apply(centred)) / np.sum(centred**2)
    assert found.scale == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("xp", [np, jnp])
def test_points_that_coincide_have_no_scale(xp):
    _, target, _ = similar_points(seed=5)
    found = compiled(xp, umeyama)(xp.full((20, 3), 0.1), xp.asarray(target))
    assert np.isnan(found.scale)
    assert np.isnan(found.translation).all()
    assert np.isfinite(found.rotation).all()


def alignment_error(source, target):
    """A smooth function of everything that umeyama returns."""
    found = umeyama(source, target)
    wave = np.arange(1.0, 10.0).reshape(3, 3)
    return (found.rotation * wave).sum() + found.scale**2 + (found.translation * wave[0]).sum()


def test_the_gradient_is_that_of_finite_differences():
    source, target, _ = similar_points(count=6, noise=0.3, seed=6)
    gradient = jax.jit(jax.grad(alignment_error))(jnp.asarray(source, jnp.float32), jnp.asarray(target, jnp.float32))
    numeric = approx_fprime(source.ravel(), lambda flat: alignment_error(flat.reshape(6, 3), target), 1e-6)
    np.testing.assert_allclose(gradient.ravel(), numeric, rtol=2e-3, atol=2e-3 * np.abs(numeric).max())


def test_equal_singular_values_have_the_right_gradient():
    """The SVD's own derivative divides by their difference and gives NaN here."""
    source = np.concatenate([np.eye(3), -np.eye(3)])
    gradient = jax.jit(jax.grad(alignment_error))(jnp.asarray(source), jnp.asarray(2 * source))
    numeric = approx_fprime(source.ravel(), lambda flat: alignment_error(flat.reshape(6, 3), 2 * source), 1e-6)
    np.testing.assert_allclose(gradient.ravel(), numeric, rtol=0, atol=1e-3 * np.abs(numeric).max())


@pytest.mark.parametrize("shape", ["line", "point", "mirror"])
def test_gradients_stay_finite_where_the_rotation_is_not_determined(shape):
    line = np.linspace(-1, 1, 6)[:, None] * np.ones(3)
    cube = np.concatenate([np.eye(3), -np.eye(3)])
    source, target = {"line": (line, 2 * line), "point": (0 * line, line), "mirror": (cube, -cube)}[shape]

    def error(source):
        rotation = umeyama(source, jnp.asarray(target)).rotation
        return jnp.sum((source @ rotation.T - target) ** 2 * jnp.arange(1.0, 4.0))

    assert np.isfinite(jax.jit(jax.grad(error))(jnp.asarray(source))).all()


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"expected equal shapes \[..., N, 3\], got \(4, 3\), \(5, 3\)"):
        umeyama(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"weights: expected shape \(4,\), got \(4, 1\)"):
        umeyama(np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"equal shapes \[..., N\], got \(4,\), \(4,\), \(3,\)"):
        fit_scale(np.zeros(4), np.zeros(4), np.ones(3, bool))


def depths(seed=0, count=400):
    """A skewed prediction whose least squares, median and L1 scales all differ."""
    generator = np.random.default_rng(seed)
    target = generator.uniform(1, 60, count)
    return target / 3 * generator.lognormal(0, 0.5, count), target


def scale_by_hand(prediction, target, iterations):
    scale = (sum(target) / len(target)) / (sum(prediction) / len(prediction))
    for _ in range(iterations):
        weights = [1 / (abs(scale * p - g) + 1e-8) for p, g in zip(prediction, target, strict=True)]
        above = sum(w * p * g for w, p, g in zip(weights, prediction, target, strict=True))
        below = sum(w * p * p for w, p in zip(weights, prediction, strict=True))
        scale = above / below
    return max(scale, 1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_fit_scale_makes_exactly_ten_iterations(seed):
    prediction, target = depths(seed)
    found = float(fit_scale(prediction, target, np.ones(400, bool)))
    assert found == pytest.approx(scale_by_hand(prediction, target, 10), rel=1e-7)
    for iterations in (9, 11):
        assert abs(found - scale_by_hand(prediction, target, iterations)) > 1e-6


def test_fit_scale_is_neither_the_l1_optimum_nor_least_squares_nor_the_median_ratio():
    """The protocol's own example: ten iterations 2.8757, L1 optimum 2.8339, median ratio 3.1031."""
    prediction, target = depths()
    found = float(fit_scale(prediction, target, np.ones(400, bool)))
    optimum = minimize_scalar(lambda s: np.abs(s * prediction - target).sum(), (1, 5), tol=1e-10).x
    converged = float(fit_scale(prediction, target, np.ones(400, bool), iterations=3000))
    others = [np.median(target) / np.median(prediction), prediction @ target / (prediction @ prediction)]
    assert converged == pytest.approx(optimum, rel=1e-3)
    assert 1e-4 < abs(found / optimum - 1) < 0.1
    assert min(abs(found / other - 1) for other in others) > 1e-2


def test_fit_scale_in_jax_agrees_and_reads_no_invalid_pixel():
    pairs = [depths(seed) for seed in range(3)]
    prediction, target = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    expected = [scale_by_hand(prediction[i, 50:], target[i, 50:], 10) for i in range(3)]
    prediction[:, :50] = np.nan
    valid = np.broadcast_to(np.arange(400) >= 50, (3, 400))
    with jax.enable_x64(True):
        double = jax.jit(fit_scale)(jnp.asarray(prediction), jnp.asarray(target), jnp.asarray(valid))
    assert double.dtype == jnp.float64
    np.testing.assert_allclose(double, expected, rtol=1e-7)
    single = [jnp.asarray(array, jnp.float32) for array in (prediction, target)]
    found = jax.jit(fit_scale)(*single, jnp.asarray(valid))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    gradient = jax.jit(jax.grad(lambda p: fit_scale(p, single[1], jnp.asarray(valid)).sum()))(single[0])
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:, 50:]).sum() > 0


def test_fit_scale_is_never_below_a_thousandth_and_nan_without_pixels():
    prediction, target = depths()
    everything, nothing = np.ones(400, bool), np.zeros(400, bool)
    assert fit_scale(-prediction, target, everything) == 1e-3
    assert fit_scale(1e6 * prediction, target, everything) == 1e-3
    assert np.isnan(fit_scale(prediction, target, nothing))
    assert np.isnan(fit_scale(0 * prediction, target, everything))


def test_fit_scale_and_shift_is_least_squares():
    prediction, target = depths()
    weights = np.random.default_rng(7).uniform(0, 2, 400)
    weights[:30] = 0
    for valid in (weights > 0, weights):
        root = np.sqrt(valid.astype(float))
        matrix = np.stack([prediction, np.ones(400)], axis=1) * root[:, None]
        expected = np.linalg.lstsq(matrix, target * root, rcond=None)[0]
        broken = np.where(weights > 0, prediction, np.nan)
        np.testing.assert_allclose(fit_scale_and_shift(broken, target, valid), expected, rtol=1e-10)
        single = [jnp.asarray(array, jnp.float32) for array in (broken, target)]
        found = jax.jit(fit_scale_and_shift)(*single, jnp.asarray(valid))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        gradient = jax.jit(jax.grad(lambda *arrays: sum(fit_scale_and_shift(*arrays))))(*single, jnp.asarray(valid))
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[30:]).sum() > 0


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_constant_prediction_has_no_scale_and_shift(xp):
    target = xp.asarray(depths()[1])
    for valid in (xp.ones(400, bool), xp.arange(400) == 7, xp.zeros(400, bool)):
        assert np.isnan(compiled(xp, fit_scale_and_shift)(xp.full(400, 0.1), target, valid)).all()
