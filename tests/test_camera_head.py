"""The camera head against Depth Anything 3's (golden 06b)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error

from omnistream_jax.convert.depth_anything3 import camera_head_tensors, convert_camera_head
from omnistream_jax.models.camera_head import CameraHead

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_golden("06b_da3_camera_dec")


def test_head_agrees_with_depth_anything_3_in_values_and_gradients(golden):
    width = golden.config["dim_in"]
    head = CameraHead(width)

    def loss(params, camera):
        pose = head.apply({"params": params}, camera)
        return jnp.sum(pose * golden.cotangents["pose_enc"]), pose

    params, camera = convert_camera_head(golden.weights, width=width), golden.inputs["feat"]
    (value, pose), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, camera)
    assert relative_error(pose, golden.outputs["pose_enc"]) <= TOLERANCE
    assert np.any(golden.outputs["pose_enc"][..., 7:] == 0)  # the ReLU on the field of view cuts
    assert relative_error(value, golden.grads["loss"]) <= TOLERANCE
    assert relative_error(gradients[1], golden.grads["input:feat"]) <= TOLERANCE
    ours = camera_head_tensors(gradients[0])
    errors = {name: relative_error(tensor, golden.grads[name]) for name, tensor in ours.items()}
    assert len(errors) == len(golden.weights)
    assert max(errors.values()) <= TOLERANCE, errors


def test_head_starts_near_the_identity_pose_with_a_view_of_one_radian():
    camera = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    head = CameraHead(width=256)
    params = head.init(jax.random.key(0), camera)["params"]
    pose = head.apply({"params": params}, camera)
    np.testing.assert_allclose(pose, np.broadcast_to([0, 0, 0, 0, 0, 0, 1, 1, 1], (5, 9)), atol=0.1)
    assert np.all(np.std(pose, axis=0) > 0)  # the token counts from the start


def test_bfloat16_head_has_float32_params_and_a_float32_output_layer(golden):
    params = convert_camera_head(golden.weights, width=32)
    head = CameraHead(32, jnp.bfloat16)
    shapes = jax.eval_shape(head.init, jax.random.key(0), golden.inputs["feat"])
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    pose = head.apply({"params": params}, golden.inputs["feat"])
    assert pose.dtype == jnp.float32
    assert 1e-5 < relative_error(pose, golden.outputs["pose_enc"]) < 3e-2
    assert np.any(pose != pose.astype(jnp.bfloat16).astype(jnp.float32))


def test_any_leading_shape_gives_the_same_numbers(golden):
    head, params = CameraHead(32), convert_camera_head(golden.weights, width=32)
    pose = head.apply({"params": params}, golden.inputs["feat"][1, 2])
    assert relative_error(pose, golden.outputs["pose_enc"][1, 2]) <= TOLERANCE
