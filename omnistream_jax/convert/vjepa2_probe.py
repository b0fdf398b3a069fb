"""V-JEPA 2's attentive classifier, read and written: models/attentive_probe.py is ours.

Two layouts of names: "vjepa2", the original's (`pooler.blocks.0.attn.qkv.weight`), and "transformers", that of Hugging
Face's VJEPA2ForVideoClassification (`pooler.self_attention_layers.0.self_attn.q_proj.weight`), which keeps queries,
keys and values apart and has the backbone, `vjepa2.*`, in the same file.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnistream_jax.convert import files
from omnistream_jax.convert.fields import read_field
from omnistream_jax.convert.files import WeightsError
from omnistream_jax.convert.rules import Rule, check_names, dense, reshape, same, to_params, to_tensors
from omnistream_jax.models.attentive_probe import AttentiveProbe
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.tensor_file import write_tensors

HEADS = 16
"""Of V-JEPA 2's probes of every size; weights do not tell."""
_WRAPPER = "module."  # what training on several devices puts before every name
_EPSILONS = {"vjepa2": 1e-5, "transformers": 1e-6}


@dataclasses.dataclass(frozen=True)
class ProbeSizes:
    """Sizes of an attentive probe, which its tensors tell.

    Attributes:
        width: D, of the tokens.
        hidden: of the MLPs.
        depth: blocks, the cross-attention included.
        classes: outputs.
    """

    width: int
    hidden: int
    depth: int
    classes: int


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a layout calls the parts."""

    block: str
    cross: str
    linear: str
    norm: str
    attention: str
    output: str
    cross_attention: str
    foreign: tuple[str, ...]  # prefixes of tensors in the same file that are someone else's


LAYOUTS = {
    "vjepa2": _Layout(
        block="pooler.blocks.{}",
        cross="pooler.cross_attention_block",
        linear="linear",
        norm="norm",
        attention="attn",
        output="proj",
        cross_attention="xattn",
        foreign=(),
    ),
    "transformers": _Layout(
        block="pooler.self_attention_layers.{}",
        cross="pooler.cross_attention_layer",
        linear="classifier",
        norm="layer_norm",
        attention="self_attn",
        output="out_proj",
        cross_attention="cross_attn",
        foreign=("vjepa2.",),
    ),
}
_QUERY = "pooler.query_tokens"


def load_attentive_probe(path: str | os.PathLike, heads: int = HEADS) -> tuple[AttentiveProbe, dict[str, Any]]:
    """Reads a probe, in either layout, with its sizes as the tensors tell them.

    Args:
        path: a safetensors file; or a directory or hub id of `transformers`, whose config.json tells the heads and
            the norms' epsilon. A file has the epsilon of its layout's code, 1e-5 or 1e-6.
        heads: of attention, where nothing but tensors tells of the probe.

    Returns:
        The module and its parameters, NumPy float32 arrays.

    Raises:
        WeightsError: one error that names the file and every tensor that is missing, unexpected, or of another shape
            or type.
    """
    epsilon = None
    if Path(path).expanduser().is_file():
        source = Path(path).expanduser()
        tensors = files.read_tensor_file(source)
    else:
        directory = files.find_directory(path)
        config = files.read_json(directory / files.CONFIG_NAME)
        heads = read_field(config, "num_attention_heads", int, heads)
        epsilon = read_field(config, "layer_norm_eps", float, _EPSILONS["transformers"])
        source, tensors = directory / files.CONFIG_NAME, files.read_tensors(directory)
    tensors = _unwrapped(tensors)
    layout = find_layout(tensors, str(source))
    sizes = find_sizes(tensors, layout, str(source))
    params = convert_attentive_probe(tensors, sizes, layout=layout, source=str(source))
    if heads < 1 or sizes.width % heads:
        raise WeightsError(f"{source}: expected a number of heads that divides the width {sizes.width}, got {heads}")
    probe = AttentiveProbe(
        classes=sizes.classes,
        heads=heads,
        depth=sizes.depth,
        hidden=sizes.hidden,
        norm_epsilon=_EPSILONS[layout] if epsilon is None else epsilon,
    )
    return probe, params


def save_attentive_probe(path: str | os.PathLike, params: Mapping[str, Any], layout: str = "vjepa2") -> None:
    """Writes a probe's parameters as one safetensors file, aside and then renamed, under the names of a layout."""
    tensors = attentive_probe_tensors(params, layout)
    with written_aside(Path(path)) as aside:
        write_tensors(aside, tensors, {"format": "pt"})


def convert_attentive_probe(
    tensors: Mapping[str, np.ndarray],
    sizes: ProbeSizes,
    *,
    layout: str = "vjepa2",
    source: str = "V-JEPA 2 attentive classifier",
) -> dict[str, Any]:
    """Parameters of our `AttentiveProbe` from a layout's tensors.

    Args:
        tensors: by their names; of `transformers`, those of the backbone may be among them.
        sizes: of the probe.
        layout: one of LAYOUTS.
        source: what errors call the tensors, best the file's path.

    Raises:
        WeightsError: one error that names every tensor that is missing, unexpected, or of another shape or type.
    """
    foreign = _layout(layout).foreign
    ours = {name: tensor for name, tensor in tensors.items() if not name.startswith(foreign)} if foreign else tensors
    rules = _rules(sizes, layout)
    check_names(source, ours, rules, 0)
    return to_params(ours, rules, 0)


def attentive_probe_tensors(params: Mapping[str, Any], layout: str = "vjepa2") -> dict[str, np.ndarray]:
    """A layout's tensors, float32, from parameters of our `AttentiveProbe`."""
    pooler = params["pooler"]
    width, hidden = pooler["cross"]["mlp"]["hidden"]["kernel"].shape
    depth = 1 + sum(name.startswith("block_") for name in pooler)
    return to_tensors(params, _rules(ProbeSizes(width, hidden, depth, params["linear"]["bias"].shape[0]), layout), 0)


def find_layout(tensors: Mapping[str, np.ndarray], source: str) -> str:
    """The layout to which the tensors' names belong; WeightsError where that is none."""
    for name, layout in LAYOUTS.items():
        if any(tensor.startswith(f"{layout.cross}.") for tensor in tensors):
            return name
    some = ", ".join(sorted(tensors)[:3]) or "none"
    expected = " or ".join(f"{layout.cross}.*" for layout in LAYOUTS.values())
    raise WeightsError(f"{source}: expected an attentive probe, with tensors {expected}; found {some}, ...")


def find_sizes(tensors: Mapping[str, np.ndarray], layout: str, source: str) -> ProbeSizes:
    """The sizes that the tensors of a layout tell; WeightsError where those that would are not there."""
    names = _layout(layout)
    telling = {_QUERY: 3, f"{names.cross}.mlp.fc1.weight": 2, f"{names.linear}.weight": 2}
    problems = [
        f"{name} is {'missing' if name not in tensors else f'of shape {list(tensors[name].shape)}'}, "
        f"expected an array of {axes} axes"
        for name, axes in telling.items()
        if name not in tensors or tensors[name].ndim != axes
    ]
    if problems:
        raise WeightsError(f"{source}: " + "; ".join(problems))
    query, hidden, linear = (tensors[name] for name in telling)
    pattern = re.compile(re.escape(names.block).replace(r"\{\}", r"(\d+)") + r"\.")
    blocks = {int(match[1]) for match in map(pattern.match, tensors) if match}
    return ProbeSizes(query.shape[-1], hidden.shape[0], 1 + max(blocks, default=-1) + 1, linear.shape[0])


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    if not all(name.startswith(_WRAPPER) for name in tensors):
        return tensors
    return {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}


def _layout(name: str) -> _Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def _rules(sizes: ProbeSizes, layout: str) -> list[Rule]:
    names, width = _layout(layout), sizes.width
    rules = [
        reshape("pooler/query", _QUERY, (1, 1, width), (width,)),
        *dense("linear", names.linear, width, sizes.classes, bias=True),
        *_common("pooler/cross", names.cross, names, sizes),
    ]
    for number in range(sizes.depth - 1):
        ours, theirs = f"pooler/block_{number}", names.block.format(number)
        attention = f"{theirs}.{names.attention}"
        rules += _common(ours, theirs, names, sizes)
        rules += dense(f"{ours}/projection", f"{attention}.{names.output}", width, width, bias=True)
        if layout == "vjepa2":
            rules += dense(f"{ours}/qkv", f"{attention}.qkv", width, 3 * width, bias=True)
        else:
            rules += _joined(f"{ours}/qkv", [f"{attention}.{part}_proj" for part in "qkv"], width)
    attention = f"{names.cross}.{names.cross_attention}"
    if layout == "vjepa2":
        rules += dense("pooler/cross/query", f"{attention}.q", width, width, bias=True)
        rules += dense("pooler/cross/key_value", f"{attention}.kv", width, 2 * width, bias=True)
    else:
        rules += dense("pooler/cross/query", f"{attention}.q_proj", width, width, bias=True)
        rules += _joined("pooler/cross/key_value", [f"{attention}.{part}_proj" for part in "kv"], width)
    return rules


def _common(ours: str, theirs: str, names: _Layout, sizes: ProbeSizes) -> list[Rule]:
    """What both kinds of blocks have: two norms and an MLP."""
    rules = []
    for norm in (1, 2):
        rules.append(same(f"{ours}/norm{norm}/scale", f"{theirs}.{names.norm}{norm}.weight", sizes.width))
        rules.append(same(f"{ours}/norm{norm}/bias", f"{theirs}.{names.norm}{norm}.bias", sizes.width))
    rules += dense(f"{ours}/mlp/hidden", f"{theirs}.mlp.fc1", sizes.width, sizes.hidden, bias=True)
    rules += dense(f"{ours}/mlp/output", f"{theirs}.mlp.fc2", sizes.hidden, sizes.width, bias=True)
    return rules


def _joined(ours: str, theirs: list[str], width: int) -> list[Rule]:
    """Their linear maps, each [D, D], one of ours, their outputs side by side."""
    path, count = tuple(ours.split("/")), len(theirs)
    kernel = Rule(
        ((*path, "kernel"),),
        tuple(f"{name}.weight" for name in theirs),
        ((width, width),) * count,
        lambda *x: (np.concatenate(x).T,),
        lambda x: np.split(x.T, count),
    )
    bias = Rule(
        ((*path, "bias"),),
        tuple(f"{name}.bias" for name in theirs),
        ((width,),) * count,
        lambda *x: (np.concatenate(x),),
        lambda x: np.split(x, count),
    )
    return [kernel, bias]
