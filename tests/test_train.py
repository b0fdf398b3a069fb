"""The training run as a whole: resuming, stopping on bad numbers, what it leaves behind."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from training_cases import PRETRAIN, REPOSITORY, small_config, whole_config

import omnistream_jax
from omnistream_jax import config as config_lib
from omnistream_jax import train as train_lib
from omnistream_jax.checkpoint import Checkpoints
from omnistream_jax.config import ConfigError
from omnistream_jax.utils.metrics import read_metrics
from omnistream_jax.utils.trees import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")
TERMS = ("dino_global", "dino_local", "ibot_image", "ibot_clip", "koleo", "gram", "teacher_entropy")
GEOMETRY = ("depth", "rays", "points", "camera")
CAPTIONS = ("caption", "token_accuracy")
NAN = float("nan")


class _KilledError(Exception):
    pass


def final_state(config, workdir):
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train_lib.build(config).state)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, state, _ = checkpoints.restore_latest(state)
    return step, named_leaves(state)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train_lib.train(whole_config(), workdir)
    return workdir


def test_a_run_leaves_metrics_checkpoints_model_and_picture(whole_run):
    rows = read_metrics(whole_run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for term in TERMS + GEOMETRY + CAPTIONS[:1]:
        values = [row[term] for row in steps]
        assert np.isfinite(values).all(), term
        assert len(set(values)) > 1, term
    assert all(row["gram"] == 0 for row in steps[:2]), "no Gram term before its teacher stands"
    assert all(row["gram"] > 0 for row in steps[2:])
    assert {f"retrieval_top1_{kind}" for kind in ("trained", "untrained")} <= set(rows[-1])
    assert {"depth_abs_rel", "depth_abs_rel_constant", "ate", "ate_still"} <= set(rows[-1])
    for name in ("attribute_accuracy", "box_iou", "answer_accuracy"):
        assert {name, f"{name}_blind"} <= set(rows[-1])
    assert Image.open(whole_run / "captions.png").size[0] > 2 * 64
    assert Image.open(whole_run / "features.png").size[0] > 2 * 64
    assert Image.open(whole_run / "geometry.png").size[0] > 2 * 32
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "6"]


def test_the_exported_model_is_the_teacher_of_the_last_checkpoint(whole_run):
    model = omnistream_jax.load(whole_run / "model")
    step, leaves = final_state(whole_config(), whole_run)
    assert step == 6
    assert model.config.rope == "dinov3"
    exported = named_leaves({"ema": {"backbone": model.params}})
    for name, leaf in exported.items():
        np.testing.assert_array_equal(leaf, leaves[name], err_msg=name)


def test_no_steps_export_and_score_what_a_run_starts_from(whole_run, tmp_path):
    train_lib.train(whole_config(steps=0, init__weights=str(whole_run)), tmp_path)
    models = [omnistream_jax.load(folder / "model") for folder in (tmp_path, whole_run)]
    for (name, leaf), expected in zip(
        named_leaves(models[0].params).items(), jax.tree.leaves(models[1].params), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    (scores,), (*_, expected) = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, whole_run))
    changed = {"step": 0, "retrieval_top1_untrained": scores["retrieval_top1_trained"]}
    changed["retrieval_within1_untrained"] = scores["retrieval_within1_trained"]
    assert scores == expected | changed


def test_a_stopped_run_resumes_bitwise(whole_run, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_die(self, step, state, metadata=None):
        save(self, step, state, metadata)
        self.wait()
        raise _KilledError

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(_KilledError):
        train_lib.train(whole_config(), tmp_path)
    monkeypatch.undo()
    train_lib.train(whole_config(), tmp_path)

    (step, resumed), (_, whole) = final_state(whole_config(), tmp_path), final_state(whole_config(), whole_run)
    assert step == 6
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, whole_run))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["loss"] for row in rows[:6]] == [row["loss"] for row in expected[:6]]


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path):
    config = small_config(optimizer__peak=1e30, optimizer__clip_norm=0.0, max_nonfinite_steps=0)
    with pytest.raises(train_lib.TrainingError, match=r"step \d: the loss of .* is not finite") as error:
        train_lib.train(config, tmp_path)
    assert ".jpg" in str(error.value) or ".mp4" in str(error.value)
    assert not (tmp_path / "model").exists()
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_device_without_memory_is_told_with_what_takes_less(tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 20 GB")

    monkeypatch.setattr(train_lib, "compile_step", out_of_memory)
    with pytest.raises(train_lib.TrainingError, match=r"out of memory; set smaller tasks\.\*\.batch_size"):
        train_lib.train(small_config(), tmp_path)


def test_another_config_in_the_same_workdir_is_refused(whole_run):
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1"):
        train_lib.train(whole_config(seed=1), whole_run)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tasks__image_ssl__paths", "/nowhere/photos", r"tasks.image_ssl.paths: /nowhere/photos"),
        ("tasks__clip_ssl__paths", "", r"tasks.clip_ssl.paths"),
        ("model__preset", "giant", r"model.preset: .*giant"),
        ("model__rope", "4d", r"^model.rope: .*4d"),
        ("model__dtype", "int8", r"model.dtype"),
        ("model__patch_size", -8, r"^model.patch_size: expected a positive number, got -8"),
        ("model__time_unit", 0.0, r"^model.time_unit: expected a positive number, got 0.0"),
        ("seed", -1, r"^seed: expected 0 or more, got -1"),
        ("seed", 2**32, r"^seed: expected 0 to 4294967295"),
        ("topology", "h100:64", r"^topology: expected none but with job=plan, got 'h100:64'"),
        ("optimizer__warmup_steps", 100, r"optimizer.warmup_steps"),
        ("optimizer__peak", 0.0, r"^optimizer.peak: expected a positive number, got 0.0"),
        ("optimizer__final", -1.0, r"^optimizer.final: expected 0 or more, got -1.0"),
        ("optimizer__clip_norm", NAN, r"^optimizer.clip_norm: expected 0 or more, got nan"),
        ("optimizer__beta1", 1.0, r"^optimizer.beta1: expected 0 or more, and less than 1, got 1.0"),
        ("optimizer__beta2", -2.0, r"^optimizer.beta2: expected 0 or more, and less than 1, got -2.0"),
        ("optimizer__factors", (1, 2), r"^optimizer.factors: expected pairs \(name, 0 or more\), got 1"),
        ("tasks__image_ssl__kind", "sound", r"tasks.image_ssl.kind"),
        ("tasks__image_ssl__weight", -1.0, r"^tasks.image_ssl.weight: expected 0 or more, got -1.0"),
        ("tasks__caption__weight", NAN, r"^tasks.caption.weight: expected 0 or more, got nan"),
        ("tasks__image_ssl__global_size", 33, r"^tasks.image_ssl.global_size: 33"),
        (
            "tasks__image_ssl__path_weights",
            (0.0,),
            r"^tasks.image_ssl.path_weights: expected a positive number for each",
        ),
        ("tasks__caption__path_weights", (1.0, 2.0), r"^tasks.caption.path_weights: .* each of the 1 paths, got \(1.0"),
        ("tasks__clip_ssl__frames", 0, r"^tasks.clip_ssl.frames: 0, expected 1 or more"),
        ("tasks__clip_ssl__short_side", -5, r"^tasks.clip_ssl.short_side: expected 0 or more, got -5"),
        ("tasks__clip_ssl__frame_rate", -5.0, r"^tasks.clip_ssl.frame_rate: expected 0 or more, got -5.0"),
        ("tasks__clip_ssl__stride", (), r"^tasks.clip_ssl.stride: expected \(smallest, largest\), .*, got \(\)"),
        ("tasks__clip_ssl__stride", ("1", "2"), r"^tasks.clip_ssl.stride: expected \(smallest, largest\)"),
        ("tasks__clip_ssl__stride", (4, 1), r"^tasks.clip_ssl.stride: expected \(smallest, largest\)"),
        ("tasks__clip_ssl__batch_size", 1, r"tasks.clip_ssl.batch_size: expected 2 or more"),
        ("tasks__image_ssl__local_crops", 0, r"tasks.image_ssl.local_crops"),
        ("self_supervision__gram__first_snapshot", 0, r"self_supervision.gram.first_snapshot"),
        ("self_supervision__rope_jitter", 0.0, r"self_supervision.rope_jitter"),
        ("self_supervision__local_weight", -0.5, r"^self_supervision.local_weight: expected 0 or more"),
        ("self_supervision__koleo_weight", NAN, r"^self_supervision.koleo_weight: expected 0 or more"),
        ("self_supervision__teacher_warmup_steps", -1, r"^self_supervision.teacher_warmup_steps: expected 0 or more"),
        ("self_supervision__gram__weight", -1.0, r"^self_supervision.gram.weight: expected 0 or more"),
        (
            "self_supervision__gram__size",
            33,
            r"^self_supervision.gram.size: expected 0, .* model.patch_size 16, got 33",
        ),
        ("self_supervision__teacher_temperature", (0.04,), r"^self_supervision.teacher_temperature: .*both positive"),
        (
            "self_supervision__teacher_temperature",
            ("a", "b"),
            r"^self_supervision.teacher_temperature: .*both positive",
        ),
        ("self_supervision__teacher_momentum", (0.9, 1.1), r"self_supervision.teacher_momentum"),
        ("checkpoint__every", 0, r"checkpoint.every: expected 1 or more"),
        ("log_every", 0, r"log_every"),
        ("loader__workers", -1, r"^loader.workers: expected 0 or more, got -1"),
        ("loader__prefetch", -1, r"^loader.prefetch: expected 0 or more, got -1"),
        ("loader__max_failed_fraction", 1.5, r"^loader.max_failed_fraction: expected a share, 0 to 1, got 1.5"),
        ("loader__max_restarts", -1, r"^loader.max_restarts: expected 0 or more, got -1"),
        ("requeue_exit_code", 2, r"^requeue_exit_code: expected 3 to 125, got 2"),
        ("requeue_exit_code", 256, r"^requeue_exit_code: expected 3 to 125, got 256"),
        ("model__layer_scale", 0.0, r"model.layer_scale: expected a positive number"),
        (
            "tasks__clip_geometry__paths",
            "/data/scannet",
            r"clip_geometry.paths: .*expected data sets as NAME:DIR",
        ),
        (
            "tasks__clip_geometry__paths",
            "kinetics:/data",
            r"paths: kinetics holds videos, expected posed",
        ),
        ("tasks__clip_geometry__height", 40, r"tasks.clip_geometry.height: expected a multiple of 16, got 40"),
        ("tasks__clip_geometry__crop_scale", (0.0, 1.0), r"tasks.clip_geometry.crop_scale"),
        (
            "tasks__clip_geometry__crop_scale",
            (0.5,),
            r"^tasks.clip_geometry.crop_scale: expected \(smallest, largest\)",
        ),
        ("tasks__clip_geometry__stride", (2,), r"^tasks.clip_geometry.stride: expected \(smallest, .*, got \(2,\)"),
        ("geometry__layers", ("0", "1", "2", "3"), r"^geometry.layers: expected 4 blocks in their order"),
        ("geometry__out_channels", (8, 8), r"^geometry.out_channels: expected 4 multiples of 4, got \(8, 8\)"),
        ("geometry__layers", (0, 1, 2, 4), r"geometry.layers: expected blocks 0 to 3"),
        ("geometry__features", 12, r"geometry.features: expected a multiple of 8, got 12"),
        ("geometry__units", "feet", r"geometry.units: expected clip or metres"),
        ("geometry__point_norm", "l3", r"geometry.point_norm: expected l1 or l2"),
        ("geometry__weights__ray", -1.0, r"geometry.weights.ray: expected 0 or more"),
        ("tasks__caption__paths", "", r"tasks.caption.paths: give data sets as NAME:DIR"),
        ("tasks__caption__paths", "/data/grit", r"caption.paths: .*expected data sets as NAME:DIR"),
        ("tasks__caption__paths", "world:train", r"caption.paths: world holds posed, expected captions"),
        ("tasks__caption__size", 40, r"tasks.caption.size: expected a multiple of 16, got 40"),
        ("tasks__caption__captions_per_row", 0, r"tasks.caption.captions_per_row: 0, expected 1 to max_tokens"),
        ("tasks__caption__batch_size", 0, r"tasks.caption.batch_size: expected a multiple"),
        ("language__tokenizer", "", r"language.tokenizer: expected a directory"),
        ("language__tokenizer", "/nowhere", r"language.tokenizer: there is no file or directory '/nowhere'"),
        ("language__decoder__preset", "huge", r"language.decoder.preset: expected one of tiny, .*, got 'huge'"),
        ("language__decoder__kv_heads", 3, r"language.decoder.heads: 4 query heads do not share 3"),
        ("language__decoder__vocabulary_size", 100, r"language.tokenizer: .* the decoder's vocabulary of 100"),
        ("language__kernel_std", 0.0, r"language.kernel_std: expected a positive number"),
        ("language__rope_jitter", 0.0, r"language.rope_jitter: expected a positive number"),
        ("language__chunk", 0, r"language.chunk: expected 1 or more"),
        ("evaluation__caption_records", 1, r"evaluation.caption_records: expected 2 or more"),
        ("evaluation__retrieval_size", 100, r"evaluation.retrieval_size: expected a multiple of 16"),
        ("evaluation__picture_frames", 99, r"99 frames were asked for"),
    ],
)
def test_a_config_that_cannot_work_is_one_clear_error(field, value, message):
    with pytest.raises(ConfigError, match=message):
        train_lib.build(whole_config(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loader__workers": 2, "loader__prefetch": 0}, r"^loader.prefetch: expected 1 or more with loader.workers"),
        (
            {"tasks__image_ssl__weight": 0.0, "self_supervision__gram__backbone": "/nowhere"},
            r"^self_supervision.gram.backbone: there is no Gram teacher",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_one_clear_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        train_lib.build(whole_config(**fields))


def test_the_gram_term_waits_for_a_snapshot_that_the_run_never_reaches():
    run = train_lib.build(small_config(steps=6, self_supervision__gram__first_snapshot=100))
    assert run.tasks[0].settings.gram_from_step == 100


def test_a_run_that_saved_nothing_does_not_bind_the_next_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    train_lib.train(small_config(steps=2, checkpoint__every=2), tmp_path)
    assert (tmp_path / "model" / "config.json").exists()


def test_a_run_whose_checkpoints_are_all_damaged_still_binds_the_next_config(tmp_path):
    config_lib.remember(small_config(), tmp_path)
    (tmp_path / "checkpoints" / "3.bad").mkdir(parents=True)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints, pytest.raises(ConfigError, match="seed: 0 -> 1"):
        train_lib._remember(small_config(seed=1), tmp_path, checkpoints)
    config_lib.remember(small_config(), tmp_path)


def test_every_weight_zero_is_refused():
    with pytest.raises(ConfigError, match="every weight is 0"):
        train_lib.build(small_config(tasks__image_ssl__weight=0.0, tasks__clip_ssl__weight=0.0))


def reduced(recipe):
    """A recipe of the paper's at a size for tests, one step of it; what is not named here stays the recipe's."""
    fields = {
        "steps": 1,
        "model.preset": "tiny",
        "optimizer.warmup_steps": 0,
        "self_supervision.prototypes": 16,
        "self_supervision.head_hidden": 16,
        "self_supervision.head_bottleneck": 8,
        "loader.workers": 0,
        "evaluation.picture_frames": 2,
        "evaluation.picture_size": 32,
        "evaluation.retrieval_size": 32,
    }
    for task in ("image_ssl", "clip_ssl"):
        small = {"paths": "embedded", "batch_size": 2, "global_size": 32, "local_size": 16}
        fields |= {f"tasks.{task}.{name}": value for name, value in small.items()}
    fields["tasks.clip_ssl.frames"] = 2
    small = {"paths": "world:train", "batch_size": 1, "frames": 2, "height": 32, "width": 32}
    fields |= {f"tasks.clip_geometry.{name}": value for name, value in small.items()}
    fields |= {"geometry.features": 8, "geometry.out_channels": (8, 8, 8, 8)}
    small = {"paths": "world_captions:train", "batch_size": 1, "captions_per_row": 2, "max_tokens": 96, "size": 32}
    fields |= {f"tasks.caption.{name}": value for name, value in small.items()}
    small = {"preset": "tiny", "vocabulary_size": 0, "width": 32, "depth": 1, "hidden": 32}
    fields |= {f"language.decoder.{name}": value for name, value in small.items()}
    fields |= {"language.tokenizer": "embedded", "evaluation.caption_records": 2}
    fields |= {"evaluation.geometry_scenes": 1, "evaluation.geometry_size": 32}
    return config_lib.load(f"{PRETRAIN}:{recipe}", fields)


@pytest.mark.parametrize(
    ("recipe", "remat"), [("stage1", "auto"), pytest.param("stage2", "block", marks=pytest.mark.slow)]
)
def test_a_recipe_of_the_paper_runs(recipe, remat, tmp_path):
    config = reduced(recipe)
    assert config.name == recipe
    assert config.model.remat == remat
    train_lib.train(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    (step,) = [row for row in rows if "loss" in row]
    assert step["step"] == 1
    assert all(np.isfinite(step[term]) for term in ("loss", "gradient_norm", *TERMS, *GEOMETRY, *CAPTIONS))
    assert step["gradient_norm"] > 0
    assert step["gram"] == 0, "without pre-trained weights the Gram term waits for its first snapshot"
    assert np.isfinite(rows[-1]["retrieval_top1_trained"])
    language = omnistream_jax.load_language(tmp_path / "model")
    assert (language.decoder.config.depth, language.size) == (1, 32)
    model = omnistream_jax.load_geometry(tmp_path / "model")
    assert model.model.config.width == 128
    assert np.isfinite(model.reconstruct(np.zeros((1, 1, 32, 32, 3), np.uint8)).depth).all()


@pytest.mark.parametrize(
    ("ablation", "task"), [("no_video", "clip_ssl"), ("no_geometry", "clip_geometry"), ("no_caption", "caption")]
)
def test_an_ablation_of_the_paper_leaves_out_its_task_alone(ablation, task):
    weights = {name: fields.weight for name, fields in config_lib.load(f"{PRETRAIN}:stage1").tasks.items()}
    assert weights == {"image_ssl": 0.1, "clip_ssl": 0.1, "clip_geometry": 1.0, "caption": 1.0}
    config = config_lib.load(f"{PRETRAIN}:stage1,{ablation}")
    assert {name: fields.weight for name, fields in config.tasks.items()} == weights | {task: 0.0}
    assert config.name == f"stage1_{ablation}"


@pytest.mark.parametrize("ablation", ["no_video", "no_geometry", "no_caption"])
def test_an_ablation_runs_at_quick_start_size(ablation, tmp_path):
    smaller = {"steps": 2, "optimizer.warmup_steps": 1, "log_every": 1}
    smaller |= {"evaluation.geometry_scenes": 1, "evaluation.caption_records": 2, "evaluation.picture_size": 96}
    train_lib.train(config_lib.load(f"{PRETRAIN}:{ablation}", smaller), tmp_path)
    steps = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    terms = {"no_video": "ibot_clip", "no_geometry": "depth", "no_caption": "caption"}
    for term in terms.values():
        assert all(np.isfinite(row[term]) for row in steps) if term != terms[ablation] else term not in steps[0]


def run_main(*arguments):
    command = [sys.executable, "-m", "omnistream_jax.main", f"--config={PRETRAIN}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.peek=1"], "did you mean optimizer.peak?"),
        (["--config.init.backbone=/nowhere/dinov3"], "/nowhere/dinov3: no such directory"),
        (["--config.init.decoder=/nowhere/qwen3"], "/nowhere/qwen3: no such directory"),
    ],
)
def test_the_command_line_tells_an_error_in_one_message(arguments, message, tmp_path):
    done = run_main(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
