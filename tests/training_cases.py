"""A pre-training config small enough for tests, and tasks made of it."""

from pathlib import Path

from ml_collections import ConfigDict

from omnistream_jax import config as config_lib

REPOSITORY = Path(__file__).resolve().parents[1]
PRETRAIN = str(REPOSITORY / "configs" / "pretrain.py")


def small_config(**overrides: object) -> ConfigDict:
    """The quick start's self-supervision with fewer, smaller crops; `overrides` spell dotted names with "__"."""
    small = {
        "steps": 6,
        "optimizer.warmup_steps": 2,
        "optimizer.freeze_prototypes_steps": 1,
        "self_supervision.prototypes": 32,
        "self_supervision.head_hidden": 32,
        "self_supervision.head_bottleneck": 16,
        "self_supervision.gram.first_snapshot": 2,
        "self_supervision.gram.snapshot_every": 2,
        "log_every": 1,
        "checkpoint.every": 3,
        "evaluation.picture_frames": 2,
        "evaluation.picture_size": 64,
        "evaluation.retrieval_size": 32,
    }
    for task, batch in (("image_ssl", 3), ("clip_ssl", 2)):
        small |= {f"tasks.{task}.batch_size": batch, f"tasks.{task}.global_size": 32, f"tasks.{task}.local_size": 16}
    small["tasks.clip_ssl.frames"] = 2
    small["tasks.clip_geometry.weight"] = 0.0
    small |= {"geometry.features": 8, "geometry.out_channels": (8, 8, 8, 8), "evaluation.geometry_scenes": 2}
    small |= {"evaluation.geometry_size": 32, "tasks.clip_geometry.frames": 2}
    small |= {"tasks.clip_geometry.height": 32, "tasks.clip_geometry.width": 32}
    small |= {"tasks.caption.weight": 0.0, "tasks.caption.size": 32, "tasks.caption.captions_per_row": 2}
    small |= {"tasks.caption.max_tokens": 96, "evaluation.caption_records": 2, "mesh.data": -1}
    small |= {f"language.decoder.{field}": value for field, value in {"width": 32, "depth": 1, "hidden": 32}.items()}
    return config_lib.load(PRETRAIN, small | {name.replace("__", "."): value for name, value in overrides.items()})


def whole_config(**overrides: object) -> ConfigDict:
    """The same with every task that the quick start trains."""
    return small_config(**{"tasks__clip_geometry__weight": 1.0, "tasks__caption__weight": 1.0, **overrides})
