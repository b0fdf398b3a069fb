"""A run that starts from a directory of DINOv3's weights."""

import backbone_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden, relative_error
from self_supervision_cases import first_batch
from training_cases import small_config

from omnistream_jax import train as train_lib
from omnistream_jax.build import build
from omnistream_jax.config import ConfigError
from omnistream_jax.convert import layouts
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.models import presets
from omnistream_jax.step import make_accumulate

GOLDEN = presets.BackboneConfig(width=64, depth=3, heads=4, mlp_width=128)


@pytest.fixture
def golden():
    return load_golden("02a_square_dinov3_hf")


def test_the_student_and_the_gram_teacher_start_from_the_weights(golden, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "golden", GOLDEN)
    directory = cases.write_model(tmp_path / "dinov3", golden.weights, golden.config)
    run = train_lib.build(small_config(init__backbone=str(directory), model__preset="golden"))

    task = next(task for task in run.tasks if task.kind == "image")
    weights = layouts.from_tensors(golden.weights, golden.config).params
    cases.assert_same_bits(run.state.gram, weights)
    assert jax.tree.structure(run.state.gram) == jax.tree.structure(weights)
    assert task.gram_backbone.config.rope == "dinov3_2d"
    assert task.backbone.config.rope == "dinov3"
    frames = cases.channels_last(golden.inputs["pixel_values"])[:, None]
    out = jax.jit(task.gram_backbone.apply)({"params": run.state.gram}, frames)
    assert relative_error(out.cls[:, 0], golden.outputs["pooler_output"]) <= 2e-4

    registers = golden.weights["embeddings.register_tokens"][0]
    for params in (run.state.params["backbone"], run.state.ema["backbone"]):
        np.testing.assert_array_equal(params["register_tokens"], np.stack([registers, registers]))
        np.testing.assert_array_equal(params["cls_token"], golden.weights["embeddings.cls_token"].ravel())
        cases.assert_same_bits(params["norm"], weights["norm"])

    gradients = jax.tree.map(jnp.zeros_like, run.state.params)
    gradients, metrics = make_accumulate(task, seed=0)(run.state, gradients, first_batch(task))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, metrics)))
    assert metrics["gram"] > 0, "the Gram teacher stands from the first step"
    assert all(np.any(gradients["backbone"]["blocks"]["attention"][name]) for name in ("qkv_kernel", "value_bias"))


def test_omnistreams_weights_are_trained_on_with_the_rotary_layout_that_they_have(tmp_path, monkeypatch):
    golden = load_golden("01a_omnistream_offline")
    directory = str(cases.write_model(tmp_path / "omnistream", golden.weights, golden.config))
    monkeypatch.setitem(presets.PRESETS, "golden", layouts.read(directory).config)
    fields = {"init__backbone": directory, "model__preset": "golden"}
    with pytest.raises(WeightsError, match=r"rope: released, the model has dinov3 \(model.rope\)$"):
        build(small_config(**fields))
    params = build(small_config(**fields, model__rope="released")).state.params["backbone"]
    weights = layouts.read(directory).params
    cases.assert_same_bits({name: params[name] for name in weights}, weights)


def test_without_self_supervision_on_images_there_is_no_gram_teacher():
    config = small_config(tasks__image_ssl__weight=0.0)
    assert config.self_supervision.gram.weight != 0
    assert build(config).state.gram is None
    assert build(small_config()).state.gram is not None


def test_a_decoder_to_start_from_that_nothing_trains_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^init.decoder: no task trains a decoder"):
        build(small_config(init__decoder=str(tmp_path)))
