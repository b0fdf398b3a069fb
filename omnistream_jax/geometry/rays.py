"""Ray maps, points from rays, and cameras from ray maps.

A ray is [o, d]: the camera's centre, and d = R K^-1 (u, v, 1), which is 1 deep along the camera's axis and not of unit
length, so that the point at depth D is o + D d. (Depth Anything 3 has the order [d, o].)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.geometry.arrays import einsum, matrix_of, require_shape, to_float
from omnistream_jax.geometry.cameras import camera_rays, compose_pose, pixel_centres

# Residuals below this share of the values' size are rounding: reweighting must not tell between them.
RESIDUAL_FLOOR = 1e-6
# [k, i, j]: the cross product, (a x b)_k = sum over i and j of this times a_i b_j.
CROSS = np.array(
    [[[0, 0, 0], [0, 0, 1], [0, -1, 0]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]], [[0, 1, 0], [-1, 0, 0], [0] * 3]]
)

# (values [..., N, 3], weights [..., N]) -> (estimate, squared residuals [..., N])
Fit = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def ray_map(
    cam_to_world: jax.Array,
    intrinsics: jax.Array,
    height: int,
    width: int,
    rows: int | None = None,
    columns: int | None = None,
) -> jax.Array:
    """Rays [o, d] through the centres of a grid of cells over the image.

    Args:
        cam_to_world: [..., 4, 4]; rays are in the frame that these poses lead to.
        intrinsics: [..., 3, 3] in pixels of the image.
        height: of the image.
        width: of the image.
        rows: of the grid; None: one per pixel.
        columns: of the grid; None: one per pixel.

    Returns:
        [..., rows, columns, 6].

    Raises:
        ValueError: shapes other than these.
    """
    require_shape("cam_to_world", cam_to_world, 4, 4)
    cam_to_world, intrinsics = to_float(cam_to_world, intrinsics)
    directions = camera_rays(intrinsics, pixel_centres(height, width, rows, columns))
    directions = einsum("...ij,...rcj->...rci", cam_to_world[..., :3, :3], directions)
    origins = jnp.broadcast_to(cam_to_world[..., None, None, :3, 3], directions.shape)
    return jnp.concatenate([origins, directions], axis=-1)


def points_from_rays(rays: jax.Array, depth: jax.Array) -> jax.Array:
    """Points o + depth * d [..., 3] of rays [..., 6] and depths [...], which broadcast.

    Raises:
        ValueError: rays whose last axis is not 6 long.
    """
    require_shape("rays", rays, 6)
    rays, depth = to_float(rays, depth)
    return rays[..., :3] + depth[..., None] * rays[..., 3:]


def camera_from_rays(
    rays: jax.Array,
    height: int,
    width: int,
    weights: jax.Array | None = None,
    *,
    unit_depth: bool = True,
    iterations: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The pinhole camera that fits a ray map best.

    Its centre is the weighted mean of the origins. Its directions are d = A (u, v, 1) with A = R K^-1 a rotation times
    an upper triangular matrix, so A is fitted to them and split by QR with a positive diagonal. Principal points may
    lie anywhere. (Depth Anything 3 splits into a rotation and a lower triangular matrix, which is the same only for
    principal points at the centre: golden 07c.) A mirrored ray map, det A < 0, which no camera has, gives the camera
    of the opposite directions.

    Args:
        rays: [..., rows, columns, 6] at the centres of a grid of cells over the image, at least 2 x 2.
        height: of the image in pixels.
        width: of the image in pixels.
        weights: [..., rows, columns], from 0 on, such as confidences; None: all alike. Where they are 0 the rays have
            no effect, NaN included. Cells that are not all on one line need weight, else the result is not finite.
        unit_depth: directions are 1 deep along the camera's axis, and A is their linear least-squares fit. False:
            their lengths mean nothing, and A is fitted to where they point, as in `homography`; slower, by an SVD.
        iterations: rounds of reweighting by 1 / (1 + residual² / (2 median residual)²), Cauchy's weights, against
            cells that are far off: ten rounds undo 30 % of noise. 0: the plain fit, the only one without unit depth
            (there outliers draw it into collapsed matrices that reweighting does not leave).

    Returns:
        cam_to_world [..., 4, 4] and intrinsics [..., 3, 3], upper triangular (with skew, if rays have it), scaled to 1
        in the corner. Gradients treat the factors of the reweighting as constants.

    Raises:
        ValueError: shapes other than these, or iterations without unit_depth.
    """
    require_shape("rays", rays, 6)
    if iterations < 0 or (iterations > 0 and not unit_depth):
        raise ValueError(f"iterations: expected 0, or more with unit_depth, got {iterations}")
    if jnp.ndim(rays) < 3 or min(jnp.shape(rays)[-3:-1]) < 2:
        raise ValueError(f"rays: expected shape [..., 2 or more, 2 or more, 6], got {list(jnp.shape(rays))}")
    *batch, rows, columns, _ = jnp.shape(rays)
    rays, weights = to_float(rays, jnp.ones((rows, columns), bool) if weights is None else weights)
    require_shape("weights", weights, rows, columns)
    weights = jnp.broadcast_to(weights, rays.shape[:-1]).reshape(*batch, rows * columns)
    rays = jnp.where(weights[..., None] > 0, rays.reshape(*batch, rows * columns, 6), 0)

    cells = _homogeneous(pixel_centres(2, 2, rows, columns).reshape(-1, 2) - 1).astype(rays.dtype)
    from_cells = jnp.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]], rays.dtype)
    origin = _robust(_fit_mean, rays[..., :3], weights, iterations)
    if unit_depth:
        matrix = _robust(_fit_linear(cells), rays[..., 3:], weights, iterations)
    else:
        matrix = _direct_linear_transform(cells, _unit(rays[..., 3:]), weights)
    rotation, upper = _split(matrix)
    identity = jnp.broadcast_to(jnp.eye(3, dtype=upper.dtype), upper.shape)
    intrinsics = einsum("ij,...jk->...ik", from_cells, jax.scipy.linalg.solve_triangular(upper, identity))
    return compose_pose(rotation, origin), intrinsics / intrinsics[..., 2:, 2:]


def homography(source: jax.Array, target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The homography from points of a plane to points of another, by the direct linear transform.

    Hartley and Zisserman, Multiple View Geometry (2004), algorithm 4.2, with weights.

    Args:
        source: [..., N, 2], N >= 4, no three of four points on a line.
        target: [..., N, 2].
        weights: [..., N], from 0 on; None: all alike.

    Returns:
        [..., 3, 3] with 1 in the corner, so that (target, 1) ~ H (source, 1).

    Raises:
        ValueError: shapes other than these, or N < 4.
    """
    require_shape("source", source, 2)
    require_shape("target", target, *jnp.shape(source)[-2:])
    if jnp.ndim(source) < 2 or jnp.shape(source)[-2] < 4:
        raise ValueError(f"source: expected shape [..., 4 or more, 2], got {list(jnp.shape(source))}")
    points = jnp.shape(source)[-2]
    source, target, weights = to_float(source, target, jnp.ones(points, bool) if weights is None else weights)
    require_shape("weights", weights, points)
    to_source, to_target = _centring(source, weights), _centring(target, weights)
    matrix = _direct_linear_transform(
        einsum("...ij,...nj->...ni", to_source, _homogeneous(source)),
        einsum("...ij,...nj->...ni", to_target, _homogeneous(target)),
        weights,
    )
    matrix = einsum("...ij,...jk->...ik", jnp.linalg.solve(to_target, matrix), to_source)
    return matrix / matrix[..., 2:, 2:]


def _homogeneous(points: jax.Array) -> jax.Array:
    """[..., 2] -> [..., 3] with a 1 behind."""
    return jnp.concatenate([points, jnp.ones_like(points[..., :1])], axis=-1)


def _centring(points: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., 3, 3] that moves the weighted mean of points [..., N, 2] to 0 and their mean square to 1."""
    mean, squares = _fit_mean(points, weights)
    scale = jax.lax.rsqrt(jnp.sum(weights * squares, axis=-1) / jnp.sum(weights, axis=-1))
    zero, one = jnp.zeros_like(scale), jnp.ones_like(scale)
    x, y = -scale * mean[..., 0], -scale * mean[..., 1]
    rows = [[scale, zero, x], [zero, scale, y], [zero, zero, one]]
    return matrix_of(rows)


def _robust(fit: Fit, values: jax.Array, weights: jax.Array, iterations: int) -> jax.Array:
    """The estimate of a fit, after rounds of reweighting by its residuals."""

    def reweight(_: int, factors: jax.Array) -> jax.Array:
        _, squares = fit(fixed_values, fixed_weights * factors)
        # The weighted mean square of the values, by which rounding is measured, and the median that tells outliers.
        size = _weighted_median(jnp.sum(jnp.square(fixed_values), axis=-1), fixed_weights)
        typical = jnp.maximum(_weighted_median(squares, fixed_weights), RESIDUAL_FLOOR**2 * size)
        return 1 / (1 + squares / jnp.maximum(4 * typical, jnp.finfo(squares.dtype).tiny)[..., None])

    fixed_values, fixed_weights = jax.lax.stop_gradient((values, weights))
    if iterations > 0:
        weights = weights * jax.lax.fori_loop(0, iterations, reweight, jnp.ones_like(fixed_weights))
    return fit(values, weights)[0]


def _weighted_median(values: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., N] -> [...]: the smallest value up to which half of the weight lies."""
    order = jnp.argsort(values, axis=-1)
    below = jnp.cumsum(jnp.take_along_axis(weights, order, axis=-1), axis=-1)
    middle = jnp.argmax(below >= below[..., -1:] / 2, axis=-1, keepdims=True)
    return jnp.take_along_axis(jnp.take_along_axis(values, order, axis=-1), middle, axis=-1)[..., 0]


def _fit_mean(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean, and squared distances from it."""
    mean = einsum("...n,...nd->...d", weights, values) / jnp.sum(weights, axis=-1)[..., None]
    return mean, jnp.sum(jnp.square(values - mean[..., None, :]), axis=-1)


def _fit_linear(cells: jax.Array) -> Fit:
    """The fit of A [..., 3, 3] in values = A cells, by least squares; cells are [N, 3]."""

    def fit(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        moments = einsum("...n,ni,nj->...ij", weights, cells, cells)
        products = einsum("...n,ni,...nj->...ij", weights, cells, values)
        matrix = jnp.swapaxes(jnp.linalg.solve(moments, products), -1, -2)
        difference = values - einsum("...ij,nj->...ni", matrix, cells)
        return matrix, jnp.sum(jnp.square(difference), axis=-1)

    return fit


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors of unit length; zero stays zero."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(vectors.dtype).tiny))


def _direct_linear_transform(source: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """A [..., 3, 3] of unit norm that minimises sum of weights |target x A source|²; points are [..., N, 3], N >= 4.

    The value comes from an SVD. Its derivative is taken through the equations that define a null vector, (M - λ) a = 0
    with M the matrix of the normal equations and a of fixed length along the SVD's: unlike an SVD's own, it is finite
    when other singular values are equal.
    """
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # n: point; k: row of the cross product; i, j: entry of A
    crossed = einsum("khi,...nh->...nki", jnp.asarray(CROSS, target.dtype), target)
    equations = einsum("...nki,...nj->...nkij", crossed, jnp.broadcast_to(source, target.shape))
    equations = equations.reshape(*equations.shape[:-2], 9)
    # No gradient through here: a root's is infinite at weight 0.
    rooted = jnp.sqrt(jax.lax.stop_gradient(weights))[..., None, None] * jax.lax.stop_gradient(equations)
    rooted = rooted.reshape(*rooted.shape[:-3], -1, 9)
    _, singular, right = jnp.linalg.svd(rooted, full_matrices=False)
    null, least = right[..., 8, :], singular[..., 8]

    normal = einsum("...n,...nki,...nkj->...ij", weights, equations, equations)
    shifted = normal - jnp.square(least)[..., None, None] * jnp.eye(9, dtype=normal.dtype)
    edge, corner = null[..., None], jnp.zeros((*null.shape[:-1], 1, 1), null.dtype)
    bordered = jnp.block([[shifted, edge], [jnp.swapaxes(edge, -1, -2), corner]])
    one = jnp.zeros((*null.shape[:-1], 10, 1), null.dtype).at[..., 9, 0].set(1)
    solution = jnp.linalg.solve(bordered, one)[..., :9, 0]
    vector = null + solution - jax.lax.stop_gradient(solution)
    return vector.reshape(*vector.shape[:-1], 3, 3)


def _split(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotation and upper triangular matrix of positive diagonal whose product is the matrix, or its negative.

    By Gram and Schmidt: of three columns, of which those of a camera are nearly orthogonal; the sign is the one of
    positive determinant.
    """
    first, second, third = jnp.moveaxis(matrix, -1, 0)
    determinant = jnp.sum(jnp.cross(first, second) * third, axis=-1)
    matrix = jnp.where(determinant[..., None, None] < 0, -matrix, matrix)
    first, second = _unit(matrix[..., 0]), matrix[..., 1]
    second = _unit(second - jnp.sum(first * second, axis=-1, keepdims=True) * first)
    rotation = jnp.stack([first, second, jnp.cross(first, second)], axis=-1)
    return rotation, jnp.triu(einsum("...ji,...jk->...ik", rotation, matrix))
