"""How foreign tensors and our parameters correspond: a table of rules, applied both ways."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omnistream_jax.convert.files import WeightsError

Shape = tuple[int, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One correspondence.

    Attributes:
        paths: where our arrays stand in the parameter tree.
        names: foreign names; "{}" in them stands for the block's number, and such arrays are stacked on our side.
        shapes: the foreign tensors' shapes, in the order of `names`.
        pack: foreign tensors -> our arrays.
        unpack: our arrays -> foreign tensors; None if the layout is only read.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    pack: Callable[..., Sequence[np.ndarray]]
    unpack: Callable[..., Sequence[np.ndarray]] | None

    @property
    def per_block(self) -> bool:
        """Whether the rule holds for every block."""
        return "{}" in self.names[0]


def reshape(path: str, name: str, shape: Shape, ours: Shape) -> Rule:
    """The same values in another shape."""
    return Rule((_path(path),), (name,), (shape,), lambda x: (x.reshape(ours),), lambda x: (x.reshape(shape),))


def same(path: str, name: str, *shape: int) -> Rule:
    """The same array under another name."""
    return reshape(path, name, shape, shape)


def dense(path: str, name: str, inputs: int, outputs: int, bias: bool, ours: Shape | None = None) -> list[Rule]:
    """A linear map: PyTorch's weight [out, in] and bias [out] to our kernel [in, out] (in shape `ours`) and bias."""
    kernel_shape = ours or (inputs, outputs)
    kernel = Rule(
        (_path(f"{path}/kernel"),),
        (f"{name}.weight",),
        ((outputs, inputs),),
        lambda x: (x.T.reshape(kernel_shape),),
        lambda x: (x.reshape(inputs, outputs).T,),
    )
    return [kernel, same(f"{path}/bias", f"{name}.bias", outputs)] if bias else [kernel]


def patch_embedding(name: str, patch_size: int, width: int) -> list[Rule]:
    """PyTorch's convolution [d, 3, p, p] to our kernel over flattened patches [p * p * 3, d]."""
    shape = (width, 3, patch_size, patch_size)
    kernel = Rule(
        (("patch_kernel",),),
        (f"{name}.weight",),
        (shape,),
        lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, width),),
        lambda x: (x.reshape(patch_size, patch_size, 3, width).transpose(3, 2, 0, 1),),
    )
    return [kernel, same("patch_bias", f"{name}.bias", width)]


def _path(path: str) -> Path:
    return tuple(path.split("/"))


def _expand(names: Iterable[str], depth: int) -> list[str]:
    return [name.format(i) for name in names for i in range(depth if "{}" in name else 1)]


def check_names(
    source: str,
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    depth: int,
    ignored: Iterable[str] = (),
) -> None:
    """Raise one WeightsError that lists every missing, unexpected and wrongly shaped tensor."""
    expected: dict[str, Shape] = {}
    for rule in rules:
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            expected |= dict.fromkeys(_expand([name], depth), shape)
    ignored = set(_expand(ignored, depth))
    lines = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name in ignored:
            continue
        if name not in expected:
            lines.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            lines.append(f"wrong shape {name}: expected {list(expected[name])}, got {list(tensor.shape)}")
        elif tensor.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            lines.append(f"wrong type {name}: expected floats, got {tensor.dtype}")
    if lines:
        raise WeightsError(f"{source}: {len(lines)} tensors do not fit the configuration\n  " + "\n  ".join(lines))


def to_params(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], depth: int) -> dict[str, Any]:
    """Foreign tensors to our parameter tree, float32."""
    params: dict[str, Any] = {}
    for rule in rules:
        numbers = range(depth) if rule.per_block else [0]
        packed = [rule.pack(*(np.asarray(tensors[name.format(i)], np.float32) for name in rule.names)) for i in numbers]
        for path, *arrays in zip(rule.paths, *packed, strict=True):
            array = np.stack(arrays) if rule.per_block else arrays[0]
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = np.ascontiguousarray(array)
    return params


def to_tensors(params: Mapping[str, Any], rules: Sequence[Rule], depth: int) -> dict[str, np.ndarray]:
    """Our parameter tree to foreign tensors, float32."""
    tensors: dict[str, np.ndarray] = {}
    for rule in rules:
        arrays = []
        for path in rule.paths:
            node: Any = params
            for key in path:
                node = node[key]
            arrays.append(np.asarray(node, np.float32))
        for i in range(depth) if rule.per_block else [0]:
            unpacked = rule.unpack(*(array[i] if rule.per_block else array for array in arrays))
            for name, tensor in zip(rule.names, unpacked, strict=True):
                tensors[name.format(i)] = np.ascontiguousarray(tensor)
    return tensors
