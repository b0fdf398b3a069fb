"""Quaternions and rotation matrices against VGGT's (golden 07a) and SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry_cases import check_gradients, compiled
from goldens import load_golden, relative_error
from scipy.spatial.transform import Rotation

from omnistream_jax.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix

TOLERANCE = 1e-5
HALF_TURN_AXES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 3, 4], [1, 2, -2], [-1, -1, -1]], float)

to_matrix = compiled(quaternion_to_matrix)
to_quaternion = compiled(matrix_to_quaternion)


def half_turns() -> Rotation:
    axes = HALF_TURN_AXES / np.linalg.norm(HALF_TURN_AXES, axis=-1, keepdims=True)
    return Rotation.from_rotvec(np.pi * axes)


def near_half_turns() -> Rotation:
    """Turns by 170 degrees about each axis, either way: every branch but that of w."""
    return Rotation.from_rotvec(np.deg2rad(170) * np.concatenate([np.eye(3), -np.eye(3)]) + 0.05)


def test_a_quarter_turn_about_z():
    quaternion = np.array([0, 0, 1, 1], np.float32)
    np.testing.assert_allclose(to_matrix(quaternion), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(to_quaternion(to_matrix(quaternion)), [0, 0, 0.70710678, 0.70710678], atol=1e-6)


def test_both_agree_with_vggt():
    golden = load_golden("07a_vggt_pose_encoding")
    assert relative_error(to_matrix(golden.inputs["quats"]), golden.outputs["mat_of_quats"]) <= TOLERANCE
    quaternions = to_quaternion(golden.inputs["extrinsics"][..., :3])
    assert relative_error(quaternions, golden.outputs["quat_of_R"]) <= TOLERANCE


def test_random_rotations_agree_with_scipy():
    rotations = Rotation.random(200, random_state=0)
    quaternions = to_quaternion(rotations.as_matrix())
    assert quaternions.dtype == jnp.float32
    assert relative_error(quaternions, rotations.as_quat(canonical=True)) <= 1e-6
    lengths = np.geomspace(1e-30, 1e30, 200)[:, None]
    assert relative_error(to_matrix(rotations.as_quat() * lengths), rotations.as_matrix()) <= 1e-6


def test_each_branch_agrees_with_scipy():
    rotations = Rotation.concatenate([near_half_turns(), Rotation.from_rotvec(0.3 * np.eye(3)), Rotation.identity()])
    quaternions = np.asarray(to_quaternion(rotations.as_matrix()))
    assert set(np.argmax(np.abs(quaternions), axis=-1)) == {0, 1, 2, 3}
    assert relative_error(quaternions, rotations.as_quat(canonical=True)) <= 1e-6


def test_half_turns_come_back():
    matrices = half_turns().as_matrix()
    quaternions = to_quaternion(matrices)
    assert np.all(np.asarray(quaternions)[:, 3] >= 0)
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=-1), 1, atol=1e-6)
    assert relative_error(to_matrix(quaternions), matrices) <= 1e-6


def test_gradients_agree_with_finite_differences():
    """At the identity, in every branch, and at half turns, where the quaternion itself jumps but not its rotation."""
    steady = Rotation.concatenate([Rotation.identity(), near_half_turns(), Rotation.random(2, random_state=1)])
    turns = half_turns().as_matrix()

    def outputs(matrices, quaternions, twists):
        # Turned a little further: finite differences stay among rotations.
        turned = turns @ quaternion_to_matrix(jnp.append(twists, jnp.ones((len(turns), 1)), axis=-1))
        again = quaternion_to_matrix(matrix_to_quaternion(turned))
        return matrix_to_quaternion(matrices), quaternion_to_matrix(quaternions), again

    check_gradients(outputs, steady.as_matrix(), 3 * steady.as_quat(), np.zeros((len(turns), 3)))


def test_leading_axes_are_a_batch():
    matrices = Rotation.random(6, random_state=2).as_matrix().reshape(2, 3, 3, 3).astype(np.float32)

    def there_and_back(matrix):
        quaternion = matrix_to_quaternion(matrix)
        return quaternion, quaternion_to_matrix(quaternion)

    one_by_one = compiled(jax.vmap(jax.vmap(there_and_back)))(matrices)
    batched = compiled(there_and_back)(matrices)
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, atol=1e-6), batched, one_by_one)


def test_float64_stays_float64_and_half_precision_becomes_float32():
    with jax.enable_x64(True):
        matrices = Rotation.random(3, random_state=3).as_matrix()
        again = to_matrix(to_quaternion(matrices))
        assert again.dtype == jnp.float64
        assert relative_error(again, matrices) <= 1e-14
    half = jax.ShapeDtypeStruct((3, 3), jnp.bfloat16)
    assert jax.eval_shape(matrix_to_quaternion, half).dtype == jnp.float32


def test_other_shapes_are_errors():
    with pytest.raises(ValueError, match=r"quaternion: expected shape \[..., 4\], got \[2, 3\]"):
        quaternion_to_matrix(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"rotation: expected shape \[..., 3, 3\], got \[4, 4\]"):
        matrix_to_quaternion(np.eye(4))
