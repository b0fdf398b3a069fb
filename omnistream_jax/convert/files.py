"""Reading and writing directories of `config.json` + `model.safetensors`, with errors that name the file."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.tensor_file import write_tensors
from omnistream_jax.utils.trees import describe

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = {".bin", ".pth", ".pt", ".ckpt", ".pkl"}


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit; the message names the file and what was expected."""


def find_directory(path: str | os.PathLike) -> Path:
    """The local directory of `path`: itself, or a snapshot of the hub repository of that name."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.suffix in _PICKLED:
        raise WeightsError(_pickle_message(directory))
    if directory.exists():
        raise WeightsError(f"{directory}: expected a directory with {CONFIG_NAME} and {WEIGHTS_NAME}, got a file")
    name = os.fspath(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightsError(f"{directory}: no such directory")
    try:
        from huggingface_hub import snapshot_download  # costs a second to import, and only the hub needs it

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{name}: neither a local directory nor a hub repository that could be downloaded ({reason})"
        ) from error


def _pickle_message(path: Path) -> str:
    return (
        f"{path}: pickled weights are refused, because unpickling a file can run any code in it. "
        "Convert it where you trust it: load it in PyTorch and write `safetensors.torch.save_file(state_dict, "
        f'"{WEIGHTS_NAME}")` beside {CONFIG_NAME}'
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; WeightsError if the file is missing or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors`, or of the shards that its index names."""
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if single.exists():
        return read_tensor_file(single)
    if index.exists():
        return _read_shards(index)
    pickled = sorted(path for path in directory.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise WeightsError(_pickle_message(pickled[0]))
    raise WeightsError(f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found neither")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = _read_index(index)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        content = read_tensor_file(index.parent / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if listed != set(content):
            missing, extra = sorted(listed - set(content)), sorted(set(content) - listed)
            raise WeightsError(f"{index.parent / shard}: missing {missing}, not in the index {extra}")
        tensors.update(content)
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, in the folder of the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: expected an object 'weight_map' from tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".."):
            raise WeightsError(f"{index}: the shard {shard!r} is not a plain file name")
        if Path(shard).suffix in _PICKLED:
            raise WeightsError(_pickle_message(index.parent / shard))
    return weight_map


def fingerprint(path: str | os.PathLike, *others: str) -> str:
    """sha256 of what `find_directory(path)` holds: names and contents of config.json, of the weights and of `others`.

    Args:
        path: a directory or hub id whose weights can be read.
        others: names of further files in it, of heads for instance.
    """
    directory = find_directory(path)
    weights = [WEIGHTS_NAME]
    if not (directory / WEIGHTS_NAME).exists():
        weights = [INDEX_NAME, *sorted(set(_read_index(directory / INDEX_NAME).values()))]
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, *weights, *others):
        with (directory / name).open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_tensor_file(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one safetensors file; WeightsError, naming it, if it is missing, pickled or not whole."""
    if path.suffix in _PICKLED:
        raise WeightsError(_pickle_message(path))
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except AttributeError as error:  # how safetensors says that NumPy has no such type
        raise WeightsError(
            f"{path}: holds a type that NumPy lacks, expected float32, float16 or bfloat16 ({error})"
        ) from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from error


def check_shapes(path: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one WeightsError, naming the file, that lists every missing, unexpected and wrongly shaped tensor."""
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    problems += [f"{name} is not expected" for name in sorted(tensors.keys() - shapes.keys())]
    problems += [
        f"{name} is {describe(tensors[name])}, expected shape {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise WeightsError(f"{path}: " + "; ".join(problems))


def write_directory(directory: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors, each aside and then renamed, the weights first."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with written_aside(directory / CONFIG_NAME) as text, written_aside(directory / WEIGHTS_NAME) as weights:
        write_tensors(weights, tensors, {"format": "pt"})
        text.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
