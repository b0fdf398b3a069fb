"""Parameters of another run's checkpoint as the start of this one: stage 1 -> stage 2, pre-training -> a probe."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from omnistream_jax.checkpoint import Checkpoints, differences
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.utils.trees import named_leaves

# What arrays mean and their shapes do not tell, by part.
_SAME_MEANING = {
    "backbone": ("model.rope", "model.time_unit"),
    "geometry": ("geometry.layers", "geometry.units"),
    "decoder": ("language.decoder.rope_theta", "language.decoder.norm_eps"),
}


def taken_parts(config: ConfigDict, names: Sequence[str]) -> tuple[str, ...]:
    """The parts of the parameters that come from `init.weights`: those of `init.parts`, or all of `names`.

    Raises:
        ConfigError: a part that there is not, one that `init.backbone` or `init.decoder` gives as well, or parts of
            nothing.
    """
    if not config.init.weights:
        if config.init.parts:
            raise ConfigError(f"init.parts: expected none without init.weights, got {', '.join(config.init.parts)}")
        return ()
    parts = tuple(config.init.parts) or tuple(names)
    unknown = [part for part in parts if part not in names]
    if unknown:
        raise ConfigError(f"init.parts: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    twice = [part for part in ("backbone", "decoder") if part in parts and config.init[part]]
    if twice:
        fields = " and ".join(f"init.{part}" for part in twice)
        raise ConfigError(f"{fields}: init.weights gives it already; name what to take from there in init.parts")
    return parts


def restore_weights(path: str | os.PathLike, params: Mapping[str, Any], config: ConfigDict | Mapping) -> dict[str, Any]:
    """Parameters from a checkpoint of another run: of the EMA teacher where that run had one, as what it exports.

    Optimiser, counts and teachers are left; only the arrays that are asked for are read.

    Args:
        path: a run's working directory, its `checkpoints`, or one step in there. Of several the newest whole one.
        params: {part: tree of arrays or `jax.ShapeDtypeStruct`}: what is wanted, and where it is to lie.
        config: of this run, whose fields that give the arrays their meaning must be that run's; a group or field that
            it lacks is not compared.

    Returns:
        {part: tree of `jax.Array`}.

    Raises:
        WeightsError: there is no checkpoint, or its arrays do not fit; then every difference is named.
        CheckpointError: it is damaged, or cannot be read.
    """
    directory, step = find_checkpoint(path)
    with Checkpoints(directory, read_only=True) as checkpoints:
        contents = checkpoints.contents(step)
        kind = "ema" if any(name.startswith("ema/") for name in contents.leaves) else "params"
        problems = _differences(contents.leaves, contents.metadata.get("config"), kind, params, config)
        if problems:
            lines = "\n  ".join(problems)
            raise WeightsError(f"init.weights: step {contents.step} in {directory} does not fit this run:\n  {lines}")
        wanted = {kind: dict(params)}
        _, restored, _ = checkpoints.restore_latest(wanted, partial=True, step=step)
        return restored[kind]


def find_checkpoint(path: str | os.PathLike) -> tuple[Path, int | None]:
    """The directory of checkpoints that `restore_weights` reads, and the step if the path names one.

    Raises:
        WeightsError: there is none.
    """
    path = Path(path).expanduser().absolute()
    if path.name.isdigit() and (path / "state").is_dir():
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        if directory.is_dir() and any(entry.name.isdigit() for entry in directory.iterdir()):
            return directory, None
    what = "there is no checkpoint in it" if path.is_dir() else "no such directory"
    raise WeightsError(
        f"init.weights: {path}: {what}; expected a run's --workdir, its checkpoints or one of their steps"
    )


def _differences(
    stored: Mapping[str, str],
    stored_config: Mapping | None,
    kind: str,
    params: Mapping[str, Any],
    config: ConfigDict | Mapping,
) -> list[str]:
    """A line for a part that is not in the checkpoint, an array of another shape, a field that means another thing."""
    lines = []
    for part, tree in params.items():
        own = {name: array for name, array in stored.items() if name.startswith(f"{kind}/{part}/")}
        if not own:
            there = sorted({name.split("/")[1] for name in stored if name.startswith(f"{kind}/")})
            lines.append(f"{part}: that run did not train it (it has {', '.join(there)}); leave it out of init.parts")
            continue
        lines += differences(own, {f"{kind}/{part}/{name}": leaf for name, leaf in named_leaves(tree).items()})
        for field in _SAME_MEANING.get(part, ()):
            theirs, ours = _field(stored_config, field), _field(config, field)
            if ours is not None and theirs != ours:
                lines.append(f"{field}: it was trained with {theirs}, this run has {ours}")
    return lines


def _field(config: ConfigDict | Mapping | None, field: str) -> Any:
    for name in field.split("."):
        config = None if config is None else config.get(name)
    return list(config) if isinstance(config, (list, tuple)) else config
