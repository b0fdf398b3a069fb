"""Depth Anything 3's heads <-> ours: names, shapes, channel order, and what errors say."""

import jax
import numpy as np
import pytest
from goldens import load_golden

from omnistream_jax.convert.depth_anything3 import (
    camera_head_tensors,
    convert_camera_head,
    convert_dual_dpt,
    dual_dpt_tensors,
)
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.models.camera_head import CameraHead
from omnistream_jax.models.dpt import DualDPT

SIZES = {"features": 16, "out_channels": (8, 12, 16, 16)}
NORMS = [f"scratch.output_conv2_aux.{level}.2" for level in range(4)]


@pytest.fixture
def dpt_tensors():
    return load_golden("06a_da3_dualdpt").weights


@pytest.fixture
def camera_tensors():
    return load_golden("06b_da3_camera_dec").weights


def unused_names():
    """What never gets a gradient there (golden 06a), and the shared norm's other names."""
    return set(load_golden("06a_da3_dualdpt").meta["params_without_grad"]) | {
        f"{name}.{part}" for name in NORMS[:3] for part in ("weight", "bias")
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_converted_trees_are_those_of_the_modules(dpt_tensors, camera_tensors):
    def shapes(params):
        return jax.tree.map(np.shape, params)

    features = [np.zeros((1, 1, 1, 1, 32), np.float32)] * 4
    head = DualDPT(16, **SIZES)
    expected = jax.eval_shape(lambda: head.init(jax.random.key(0), features, 16, 16))["params"]
    assert shapes(convert_dual_dpt(dpt_tensors, width=32, **SIZES)) == shapes(expected)
    expected = jax.eval_shape(CameraHead(32).init, jax.random.key(0), features[0])["params"]
    assert shapes(convert_camera_head(camera_tensors, width=32)) == shapes(expected)


def test_every_used_tensor_comes_back_under_its_name(dpt_tensors, camera_tensors):
    params = convert_dual_dpt(dpt_tensors, width=32, **SIZES)
    used = {name: tensor for name, tensor in dpt_tensors.items() if name not in unused_names()}
    assert_same_tensors(dual_dpt_tensors(params), used)
    prefixed = dual_dpt_tensors(params, prefix="model.head.")
    assert_same_tensors(prefixed, {f"model.head.{name}": tensor for name, tensor in used.items()})
    params = convert_camera_head(camera_tensors, width=32)
    assert_same_tensors(camera_head_tensors(params), camera_tensors)


def test_rays_are_reordered_to_origin_then_direction(dpt_tensors):
    bias = dpt_tensors["scratch.output_conv2_aux.3.5.bias"]
    ours = convert_dual_dpt(dpt_tensors, width=32, **SIZES)["ray_output"]["bias"]
    np.testing.assert_array_equal(ours, [*bias[3:6], *bias[:3], bias[6]])


def test_heads_are_found_under_their_prefixes_in_one_file(dpt_tensors, camera_tensors):
    tensors = {f"model.head.{name}": tensor for name, tensor in dpt_tensors.items()}
    tensors |= {f"model.cam_dec.{name}": tensor for name, tensor in camera_tensors.items()}
    tensors["model.backbone.norm.weight"] = np.ones(32, np.float32)
    assert_same_tensors(
        dual_dpt_tensors(convert_dual_dpt(tensors, width=32, prefix="model.head.", **SIZES)),
        dual_dpt_tensors(convert_dual_dpt(dpt_tensors, width=32, **SIZES)),
    )
    params = convert_camera_head(tensors, width=32, prefix="model.cam_dec.")
    assert_same_tensors(camera_head_tensors(params), camera_tensors)


def test_unused_tensors_may_be_absent_and_the_shared_norm_under_any_level(dpt_tensors):
    expected = dual_dpt_tensors(convert_dual_dpt(dpt_tensors, width=32, **SIZES))
    for kept in NORMS:
        tensors = {name: tensor for name, tensor in dpt_tensors.items() if name not in unused_names()}
        for part in ("weight", "bias"):
            tensors[f"{kept}.{part}"] = tensors.pop(f"{NORMS[3]}.{part}")
        assert_same_tensors(dual_dpt_tensors(convert_dual_dpt(tensors, width=32, **SIZES)), expected)


def test_copies_of_the_shared_norm_that_differ_are_an_error(dpt_tensors):
    dpt_tensors[f"{NORMS[1]}.bias"] = dpt_tensors[f"{NORMS[1]}.bias"] + 1
    with pytest.raises(WeightsError, match=rf"file.safetensors: .*share.*{NORMS[1]}\.bias"):
        convert_dual_dpt(dpt_tensors, width=32, source="file.safetensors", **SIZES)


def test_every_mismatch_of_a_dpt_is_named_at_once(dpt_tensors):
    del dpt_tensors["norm.weight"], dpt_tensors["scratch.refinenet2_aux.resConfUnit1.conv2.bias"]
    for name in NORMS:
        del dpt_tensors[f"{name}.weight"]
    dpt_tensors["scratch.sky.weight"] = np.zeros((2, 3), np.float32)
    dpt_tensors["projects.1.weight"] = np.zeros((12, 32), np.float32)
    dpt_tensors["projects.0.bias"] = np.zeros(8, np.int64)
    with pytest.raises(WeightsError) as error:
        convert_dual_dpt(
            {f"head.{name}": tensor for name, tensor in dpt_tensors.items()},
            width=32,
            prefix="head.",
            source="file.safetensors",
            **SIZES,
        )
    first, *lines = str(error.value).split("\n  ")
    assert first == "file.safetensors: 6 tensors do not fit the configuration"
    assert set(lines) == {
        "missing head.norm.weight [32]",
        "missing head.scratch.refinenet2_aux.resConfUnit1.conv2.bias [16]",
        "missing head.scratch.output_conv2_aux.3.2.weight [32]",
        "unexpected head.scratch.sky.weight [2, 3]",
        "wrong shape head.projects.1.weight: expected [12, 32, 1, 1], got [12, 32]",
        "wrong type head.projects.0.bias: expected floats, got int64",
    }


def test_every_mismatch_of_a_camera_head_is_named_at_once(camera_tensors):
    del camera_tensors["fc_t.bias"]
    camera_tensors["fc_qvec.weight"] = camera_tensors["fc_qvec.weight"].T
    camera_tensors["fc_focal.weight"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as error:
        convert_camera_head(camera_tensors, width=32)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "missing fc_t.bias [3]",
        "wrong shape fc_qvec.weight: expected [4, 32], got [32, 4]",
        "unexpected fc_focal.weight [3]",
    }


def test_a_prefix_that_nothing_has_is_an_error_that_shows_what_is_there(camera_tensors):
    with pytest.raises(WeightsError, match=r"expected tensors named model\.cam_dec\..*found 10 others \(backbone\.0"):
        convert_camera_head(camera_tensors, width=32, prefix="model.cam_dec.")
    with pytest.raises(WeightsError, match="no tensors"):
        convert_camera_head({}, width=32)
