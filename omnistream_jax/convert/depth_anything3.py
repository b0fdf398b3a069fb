"""Depth Anything 3's `DualDPT` and `CameraDec`, read and written: models/dpt.py and models/camera_head.py are ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.rules import Rule, check_names, dense, same, to_params, to_tensors
from omnistream_jax.models.dpt import HIDDEN_WIDTH, LEVELS

# Theirs is [d, o] and the confidence, ours [o, d]. The exchange is its own inverse.
_RAY_ORDER = np.array([3, 4, 5, 0, 1, 2, 6])
_NECK_LAYERS = 5
# Theirs has output layers for every level of the ray chain, and uses the last level's.
_UNUSED = (
    *(f"scratch.output_conv1_aux.{level}.{layer}" for level in range(LEVELS - 1) for layer in range(_NECK_LAYERS)),
    *(f"scratch.output_conv2_aux.{level}.{layer}" for level in range(LEVELS - 1) for layer in (0, 5)),
)
# All levels share one norm: a state dict has it under every level, a safetensors file under only one of them.
_RAY_NORM = f"scratch.output_conv2_aux.{LEVELS - 1}.2"
_RAY_NORM_COPIES = tuple(f"scratch.output_conv2_aux.{level}.2" for level in range(LEVELS - 1))


def convert_dual_dpt(
    tensors: Mapping[str, np.ndarray],
    *,
    width: int,
    features: int = 256,
    out_channels: Sequence[int] = (256, 512, 1024, 1024),
    prefix: str = "",
    source: str = "Depth Anything 3 head",
) -> dict[str, Any]:
    """Parameters of our `DualDPT` from Depth Anything 3's; the unused output layers of its ray chain are ignored.

    Args:
        tensors: a file's tensors; those whose names do not start with `prefix` are someone else's.
        width: D of the features that feed the head.
        features, out_channels: as `DualDPT`'s.
        prefix: such as "model.head."; what stands before "norm.weight".
        source: what errors call the tensors, best the file's path.

    Returns:
        NumPy float32 arrays, the rays' channels in our order [o, d].

    Raises:
        WeightsError: one error that names every tensor that is missing, unexpected, or of another shape or type.
    """
    ours = _with_one_ray_norm(_select(tensors, prefix, source), prefix, source)
    rules = _dual_dpt_rules(width, features, tuple(out_channels), prefix)
    ignored = [f"{prefix}{name}.{part}" for name in _UNUSED for part in ("weight", "bias")]
    check_names(source, ours, rules, 0, ignored)
    return to_params(ours, rules, 0)


def dual_dpt_tensors(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Depth Anything 3's tensors, float32, from parameters of our `DualDPT`: those that it uses, and no others."""
    width, features = params["project_0"]["kernel"].shape[0], params["reassemble_0"]["kernel"].shape[-1]
    out_channels = tuple(params[f"project_{level}"]["kernel"].shape[1] for level in range(LEVELS))
    return to_tensors(params, _dual_dpt_rules(width, features, out_channels, prefix), 0)


def convert_camera_head(
    tensors: Mapping[str, np.ndarray],
    *,
    width: int,
    prefix: str = "",
    source: str = "Depth Anything 3 camera decoder",
) -> dict[str, Any]:
    """Parameters of our `CameraHead` from Depth Anything 3's `CameraDec`.

    Args:
        tensors: as in `convert_dual_dpt`.
        width: D of the camera token and of the hidden layers.
        prefix: such as "model.cam_dec."; what stands before "backbone.0.weight".
        source: what errors call the tensors, best the file's path.

    Raises:
        WeightsError: one error that names every tensor that is missing, unexpected, or of another shape or type.
    """
    ours = _select(tensors, prefix, source)
    rules = _camera_head_rules(width, prefix)
    check_names(source, ours, rules, 0)
    return to_params(ours, rules, 0)


def camera_head_tensors(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Depth Anything 3's tensors, float32, from parameters of our `CameraHead`, whose width is the token's."""
    return to_tensors(params, _camera_head_rules(params["hidden_0"]["kernel"].shape[0], prefix), 0)


def _select(tensors: Mapping[str, np.ndarray], prefix: str, source: str) -> dict[str, np.ndarray]:
    selected = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not selected:
        some = ", ".join(sorted(tensors)[:3]) or "none"
        raise WeightsError(
            f"{source}: expected tensors named {prefix}..., found {len(tensors)} others ({some}, ...)"
            if prefix
            else f"{source}: no tensors"
        )
    return selected


def _with_one_ray_norm(tensors: Mapping[str, np.ndarray], prefix: str, source: str) -> dict[str, np.ndarray]:
    """The tensors with the shared norm under the used level's name alone; copies that differ are an error."""
    tensors = dict(tensors)
    differing = []
    for part in ("weight", "bias"):
        used = f"{prefix}{_RAY_NORM}.{part}"
        for name in (f"{prefix}{copy}.{part}" for copy in _RAY_NORM_COPIES):
            if name in tensors:
                tensor = tensors.pop(name)
                if not np.array_equal(tensor, tensors.setdefault(used, tensor)):
                    differing.append(name)
    if differing:
        raise WeightsError(
            f"{source}: all levels share one norm, but {', '.join(differing)} differ from another level's"
        )
    return tensors


def _dual_dpt_rules(width: int, features: int, out_channels: tuple[int, ...], prefix: str) -> list[Rule]:
    names = _Names(prefix)
    half = features // 2
    rules = names.norm("norm", "norm", width)
    for level, channels in enumerate(out_channels):
        rules += names.pointwise(f"project_{level}", f"projects.{level}", width, channels)
        rules += names.conv(f"reassemble_{level}", f"scratch.layer{level + 1}_rn", channels, features, bias=False)
    rules += names.transposed("resize_0", "resize_layers.0", out_channels[0], 4)
    rules += names.transposed("resize_1", "resize_layers.1", out_channels[1], 2)
    rules += names.conv("resize_3", "resize_layers.3", out_channels[3], out_channels[3])
    for level in range(LEVELS):
        for ours, suffix in (("depth", ""), ("ray", "_aux")):
            block, theirs = f"{ours}_fusion_{level}", f"scratch.refinenet{level + 1}{suffix}"
            rules += names.pointwise(f"{block}/output", f"{theirs}.out_conv", features, features)
            units = {"merged": 2} if level == LEVELS - 1 else {"lateral": 1, "merged": 2}
            for unit, number in units.items():
                for conv in ("conv1", "conv2"):
                    name = f"{theirs}.resConfUnit{number}.{conv}"
                    rules += names.conv(f"{block}/{unit}/{conv}", name, features, features)
    rules += names.conv("depth_neck", "scratch.output_conv1", features, half)
    rules += names.conv("depth_hidden", "scratch.output_conv2.0", half, HIDDEN_WIDTH)
    rules += names.pointwise("depth_output", "scratch.output_conv2.2", HIDDEN_WIDTH, 2)
    last = LEVELS - 1
    for i in range(_NECK_LAYERS):
        inputs, outputs = (half, features) if i % 2 else (features, half)
        rules += names.conv(f"ray_neck_{i}", f"scratch.output_conv1_aux.{last}.{i}", inputs, outputs)
    rules += names.conv("ray_hidden", f"scratch.output_conv2_aux.{last}.0", half, HIDDEN_WIDTH)
    rules += names.norm("ray_norm", _RAY_NORM, HIDDEN_WIDTH)
    rules += names.pointwise("ray_output", f"scratch.output_conv2_aux.{last}.5", HIDDEN_WIDTH, 7, order=_RAY_ORDER)
    return rules


class _Names:
    """Makes the rules of each kind of layer: our path, their name under the prefix, the sizes."""

    def __init__(self, prefix: str):
        self.prefix = prefix

    def norm(self, path: str, name: str, width: int) -> list[Rule]:
        name = self.prefix + name
        return [same(f"{path}/scale", f"{name}.weight", width), same(f"{path}/bias", f"{name}.bias", width)]

    def conv(self, path: str, name: str, inputs: int, outputs: int, bias: bool = True) -> list[Rule]:
        """A 3 x 3 convolution: theirs [out, in, 3, 3], ours [3, 3, in, out]."""
        name = self.prefix + name
        kernel = _kernel(path, name, (outputs, inputs, 3, 3), (2, 3, 1, 0))
        return [kernel, same(f"{path}/bias", f"{name}.bias", outputs)] if bias else [kernel]

    def transposed(self, path: str, name: str, channels: int, factor: int) -> list[Rule]:
        """A transposed convolution: theirs [in, out, k, k], ours [in, k, k, out]."""
        name = self.prefix + name
        kernel = _kernel(path, name, (channels, channels, factor, factor), (0, 2, 3, 1))
        return [kernel, same(f"{path}/bias", f"{name}.bias", channels)]

    def pointwise(
        self, path: str, name: str, inputs: int, outputs: int, order: np.ndarray | slice = slice(None)
    ) -> list[Rule]:
        """A 1 x 1 convolution [out, in, 1, 1], ours a dense layer [in, out]; `order` exchanges the outputs."""
        name = self.prefix + name
        kernel = Rule(
            ((*path.split("/"), "kernel"),),
            (f"{name}.weight",),
            ((outputs, inputs, 1, 1),),
            lambda x: (x[order, :, 0, 0].T,),
            lambda x: (x.T[order, :, None, None],),
        )
        bias = Rule(
            ((*path.split("/"), "bias"),),
            (f"{name}.bias",),
            ((outputs,),),
            lambda x: (x[order],),
            lambda x: (x[order],),
        )
        return [kernel, bias]


def _kernel(path: str, name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Rule:
    """Their kernel with its axes moved."""
    return Rule(
        ((*path.split("/"), "kernel"),),
        (f"{name}.weight",),
        (shape,),
        lambda x: (x.transpose(axes),),
        lambda x: (x.transpose(np.argsort(axes)),),
    )


def _camera_head_rules(width: int, prefix: str) -> list[Rule]:
    """Their three output layers (translation, quaternion, field of view) are one of ours."""
    parts = {"fc_t": 3, "fc_qvec": 4, "fc_fov.0": 2}
    sizes, ends = tuple(parts.values()), np.cumsum(list(parts.values()))[:-1]
    kernel = Rule(
        (("output", "kernel"),),
        tuple(f"{prefix}{name}.weight" for name in parts),
        tuple((size, width) for size in sizes),
        lambda *x: (np.concatenate(x).T,),
        lambda x: np.split(x.T, ends),
    )
    bias = Rule(
        (("output", "bias"),),
        tuple(f"{prefix}{name}.bias" for name in parts),
        tuple((size,) for size in sizes),
        lambda *x: (np.concatenate(x),),
        lambda x: np.split(x, ends),
    )
    return [
        *dense("hidden_0", f"{prefix}backbone.0", width, width, bias=True),
        *dense("hidden_1", f"{prefix}backbone.2", width, width, bias=True),
        kernel,
        bias,
    ]
