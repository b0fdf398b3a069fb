"""The device mesh, and where every array lies on it.

Three axes, of size 1 where they are not used:

    data      batches are split; parameters are whole copies
    fsdp      batches are split, and so are the parameters (ZeRO-3, Rajbhandari et al. 2020; PyTorch's FSDP)
    tensor    heads, MLPs, prototypes and the vocabulary are split (Shoeybi et al. 2019, "Megatron-LM")

"tensor" talks within a process. `RULES` say what it splits; "fsdp" splits each array along the largest axis that is
left and that it divides. An array that no axis fits, or of fewer than SMALLEST_SPLIT elements, is a whole copy. One
rule holds for a parameter, its gradient, Adam's moments and its copies in the EMA and the Gram teacher, since all bear
its name. All of them are float32 masters.

What a step sends, by design (F: on "fsdp"; on a CPU a reduce-scatter is an all-reduce and a slice):

    accumulate  F all-gather of each split parameter in the forward pass of the student and of each teacher: of a block
                alone, just before it runs (its kernels in the dtype of the computation), and of the rest once;
                F all-gather of each block's kernels again in the backward pass;
                F reduce-scatter of each split gradient, a block's as soon as it is there, and its sum over "data" in
                shards. What is no matrix product's is summed whole over both at once: small ones, the register
                tokens, and the vocabulary, of which each device adds up its own tokens' share first. Where "tensor"
                has no part in a gradient, its devices take a half each and then exchange them.
                "tensor": an all-reduce of the activations after attention and after the MLP, forward and backward, and
                of the embeddings and of the maxima and sums over prototypes and the vocabulary.
                What looks across the batch: sums over prototypes and over rows (Sinkhorn-Knopp), the features of the
                CLS tokens (KoLeo), and means' sums and counts.
    update      the norms of the gradients, scalars. Nothing else: all its arrays lie alike. Muon's
                products of split matrices send what they need besides.

With micro-batches, the parameters are gathered and the gradients scattered for each of them.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omnistream_jax.utils.trees import leaf_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The axes over which the rows of a batch are split."""
SMALLEST_SPLIT = 2**16
"""Elements of an array (of one block's share of it, where blocks are stacked) that "fsdp" finds worth a message."""
GATHERED = "gathered_params"
"""The name, for jax.checkpoint's policies, of parameters that are whole again."""

_BLOCKS = "blocks"  # below it, leaves have a leading axis [depth, ...], which is never split
_WHOLE = PartitionSpec()

# The end of a parameter's name -> its axes that "tensor" splits, without the axis of stacked blocks. The first that
# fits holds.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Prototypes [bottleneck, K], and the vocabulary [V, D].
    (r"last_layer/kernel", PartitionSpec(None, "tensor")),
    (r"decoder/(embedding|output)", PartitionSpec("tensor", None)),
    # The backbone's blocks: [d, 3, H, D], [H, D], [H, D, d], [d, hidden], [hidden, d].
    (r"blocks/attention/qkv_kernel", PartitionSpec(None, None, "tensor", None)),
    (r"blocks/attention/(query|key|value)_bias", PartitionSpec("tensor", None)),
    (r"blocks/attention/projection/kernel", PartitionSpec("tensor", None, None)),
    (r"blocks/mlp/(hidden|gate)/kernel", PartitionSpec(None, "tensor")),
    (r"blocks/mlp/(hidden|gate)/bias", PartitionSpec("tensor")),
    (r"blocks/mlp/output/kernel", PartitionSpec("tensor", None)),
    # The decoder's: [D, H or K, W], [H, W, D], [D, hidden], [hidden, D].
    (r"blocks/(query|key|value)/kernel", PartitionSpec(None, "tensor", None)),
    (r"blocks/projection/kernel", PartitionSpec("tensor", None, None)),
    (r"blocks/(gate|up)/kernel", PartitionSpec(None, "tensor")),
    (r"blocks/down/kernel", PartitionSpec("tensor", None)),
    # The projector's two layers.
    (r"projector/mlp_0/kernel", PartitionSpec(None, "tensor")),
    (r"projector/mlp_0/bias", PartitionSpec("tensor")),
    (r"projector/mlp_1/kernel", PartitionSpec("tensor", None)),
    # All else, norms, heads and counters: "fsdp" alone.
    (r".*", _WHOLE),
)
_COMPILED = tuple((re.compile(rf"(?:.*/)?(?:{pattern})"), spec) for pattern, spec in RULES)


def mesh_sizes(data: int = -1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    """The sizes of the axes of `make_mesh`, -1 filled in. Raises ValueError as that does, but for `lay_out`'s."""
    sizes, devices = {"data": data, "fsdp": fsdp, "tensor": tensor}, jax.device_count()
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(f"mesh.{axis}: expected 1 or more devices, or -1 for what is left over, got {size!r}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh.{open_axes[1]}: only one axis can be -1, and mesh.{open_axes[0]} is")
    known = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"mesh.{axis} {size}" for axis, size in sizes.items() if size not in (-1, 1)) or "1"
    if open_axes:
        if devices % known:
            raise ValueError(f"mesh.{open_axes[0]}: {asked} does not divide the {devices} devices")
        sizes[open_axes[0]] = devices // known
    elif known > devices or (known < devices and jax.process_count() > 1):
        raise ValueError(f"mesh.data: {asked} makes {known} devices, there are {devices} (-1: what is left over)")
    return sizes


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The devices of all processes along the axes ("data", "fsdp", "tensor").

    Args:
        data, fsdp, tensor: sizes of the axes; one of them may be -1, which takes what the others leave over. Without
            one, a single process may leave devices out: the first are taken.

    Raises:
        ValueError: sizes whose product is not the number of devices, or as `lay_out`; the message names the field.
    """
    sizes = mesh_sizes(data, fsdp, tensor)
    return lay_out(sizes, jax.devices()[: math.prod(sizes.values())])


def lay_out(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Devices along the axes, of sizes as `mesh_sizes` gives them.

    Raises:
        ValueError: a tensor axis that does not fit into processes, or axes that are no products of a TPU slice's sides.
    """
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if here % sizes["tensor"]:
        raise ValueError(f"mesh.tensor: expected a divisor of the {here} devices of a process, got {sizes['tensor']}")
    axis_types = (AxisType.Auto,) * len(AXES)
    try:
        mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError as error:
        raise ValueError(f"mesh: {str(error).partition('. If you want')[0]}") from error
    if _within_processes(mesh):
        return mesh
    # On a TPU, JAX's neighbours are those of the torus: four in a line are of two hosts, whose chips form squares.
    by_process = sorted(devices, key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(by_process).reshape(tuple(sizes.values())), AXES, axis_types=axis_types)
    if not _within_processes(mesh):
        raise ValueError("mesh.tensor: expected devices of one process, but processes have unequal numbers of them")
    return mesh


def mesh_here(mesh: Mesh) -> Mesh:
    """The mesh, where it is of this process alone; else this process's devices of it, all along "data"."""
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if len(here) == mesh.size:
        return mesh
    return lay_out({"data": len(here), "fsdp": 1, "tensor": 1}, here)


def _within_processes(mesh: Mesh) -> bool:
    """Whether the devices along "tensor" are of one process each time: they share the rows that it loads."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return all(len({device.process_index for device in group}) == 1 for group in groups)


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many equal parts the rows of a batch are split; without `mesh`, on that of the present `jax.set_mesh`.

    1 where there is no mesh, or one with other axes.
    """
    shape = _present_shape() if mesh is None else mesh.shape
    return math.prod(shape.get(axis, 1) for axis in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, _WHOLE)


def split_batch(mesh: Mesh) -> NamedSharding:
    """Split along the first axis over the devices of "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch, on its own devices, as arrays over the whole mesh: of all processes, or its own.

    Raises:
        ValueError: a process's devices do not hold so many rows; the message names both shapes.
    """
    sharding = split_batch(mesh)
    count = len({device.process_index for device in mesh.devices.flat})

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (count * rows.shape[0], *rows.shape[1:]))

    return {name: place(rows) for name, rows in batch.items()}


def split_micro_batches(batch: Any, count: int) -> Any:
    """Arrays [B, ...] as [count, B / count, ...]: every count-th row, so that each device splits its own rows.

    Raises:
        ValueError: rows that `count` times the batch's shards do not divide.
    """
    shards = batch_shards()

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % (count * shards):
            raise ValueError(f"{array.shape[0]} rows are no {count} equal micro-batches on each of {shards} devices")
        array = array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
        if shards == 1:
            return array
        return jax.lax.with_sharding_constraint(array, PartitionSpec(None, BATCH))

    return jax.tree.map(split, batch)


def parameter_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Where a parameter lies, or anything else of its name and shape.

    Args:
        name: as of `utils.trees.leaf_name`, as in "params/backbone/blocks/mlp/hidden/kernel".
        shape: of the whole array.
        sizes: of the axes of the mesh.

    Raises:
        ValueError: mesh.tensor does not divide an axis that it is to split.
    """
    if _BLOCKS in name.split("/")[:-1] and len(shape) > 0:
        return PartitionSpec(None, *_unstacked_spec(name, shape[1:], sizes))
    return _unstacked_spec(name, shape, sizes)


def _unstacked_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    axes = _tensor_axes(name, shape, sizes["tensor"])
    if sizes["fsdp"] > 1 and math.prod(shape) >= SMALLEST_SPLIT:
        fitting = [i for i, size in enumerate(shape) if axes[i] is None and size % sizes["fsdp"] == 0]
        if fitting:
            axes[max(fitting, key=lambda i: shape[i])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _tensor_axes(name: str, shape: tuple[int, ...], size: int) -> list[str | None]:
    axes = [None] * len(shape)
    if size == 1:
        return axes
    rule = next(spec for pattern, spec in _COMPILED if pattern.fullmatch(name))
    for i, axis in enumerate(rule):
        if axis is not None and shape[i] % size:
            raise ValueError(f"mesh.tensor: {size} does not divide the {shape[i]} of axis {i} of {name} {list(shape)}")
        axes[i] = axis
    return axes


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """The NamedSharding of every leaf of a tree of parameters, or of a whole TrainState, by `RULES`.

    Args:
        mesh: of `make_mesh`.
        abstract_state: arrays, or what `jax.eval_shape` makes of them; leaves bear their parameters' names.

    Raises:
        ValueError: mesh.tensor does not divide an axis that it is to split.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(leaf_name(path), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def put_on_mesh(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, laid out; those on the mesh already are moved there.

    Unlike `jax.device_put` it does not compare the processes' arrays, which would send all weights around.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        on_it_already = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if on_it_already or (isinstance(leaf, jax.Array) and sharding.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def copies_here(tree: Any, mesh: Mesh) -> Any:
    """Arrays that lie whole on every device of a larger mesh, as arrays on `mesh_here` of it; nothing is copied."""

    def take(leaf: jax.Array) -> jax.Array:
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), parts)

    return jax.tree.map(take, tree)


def host_copy(tree: Any) -> Any:
    """The whole arrays as NumPy's, in every process; all processes must call it, in the same order."""

    def copy(leaf: jax.Array) -> np.ndarray:
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = _gather_leaf(leaf, replicated(leaf.sharding.mesh))
        return np.asarray(leaf)

    return jax.tree.map(copy, tree)


@functools.partial(jax.jit, static_argnums=1)
def _gather_leaf(leaf: jax.Array, whole: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, whole)


def gathered(params: Any) -> Any:
    """Parameters as a forward pass takes them, inside jit: what "fsdp" splits is made whole, "tensor" stays.

    Their gradients come back split as the parameters are. Stacked blocks stay as they are, for `gathered_block`.
    Without a mesh of ours (`jax.set_mesh`) nothing changes.

    Args:
        params: {module name: its parameters}, or any part of a state whose leaves bear their parameters' names.
    """
    sizes = _present_shape()

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        name = leaf_name(path)
        return leaf if _BLOCKS in name.split("/")[:-1] else _gathered_leaf(name, leaf, sizes)

    return jax.tree_util.tree_map_with_path(gather, params) if sizes else params


def gathered_block(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """The parameters of one of the stacked blocks, without their leading axis; see `gathered`.

    Call it where the block runs, inside what is computed again in the backward pass: else all blocks would be whole at
    once.

    Args:
        params: of a block.
        dtype: of the block's products. What is sent is cast to it first, as the block would do after.
    """
    sizes = _present_shape()

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        return _gathered_leaf(f"{_BLOCKS}/{leaf_name(path)}", leaf, sizes, dtype)

    return jax.tree_util.tree_map_with_path(gather, params) if sizes else params


def on_each_device(attend: Callable[..., jax.Array], inputs: int) -> Callable[..., jax.Array]:
    """A function of `inputs` arrays [B, T, P, H, D] to one alike, run by each device of the present mesh on its part.

    Rows are split as batches are, heads H over "tensor". Without a mesh of ours it is the function itself.
    """
    if not _present_shape():
        return attend
    place = PartitionSpec(BATCH, None, None, "tensor")
    return jax.shard_map(attend, in_specs=(place,) * inputs, out_specs=place, check_vma=False)


def gathers() -> bool:
    """Whether the present mesh has parameters to gather."""
    return _present_shape().get("fsdp", 1) > 1


def _gathered_leaf(name: str, leaf: jax.Array, sizes: Mapping[str, int], dtype: Any = None) -> jax.Array:
    stored = _unstacked_spec(name, leaf.shape, sizes)
    if stored == _WHOLE:
        return leaf
    used = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored))
    if used != stored and dtype is not None:
        leaf = leaf.astype(dtype)
    return checkpoint_name(_gather(leaf, stored, used), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, stored: PartitionSpec, used: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, used)


def _gather_backward(stored: PartitionSpec, used: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Left to itself, JAX would ask for a whole gradient on every device."""
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(lambda leaf, stored, used: (_gather(leaf, stored, used), None), _gather_backward)


def _present_shape() -> dict[str, int]:
    """The sizes of the present mesh's axes, if it is one of ours of several devices; else {}."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or tuple(mesh.axis_names) != AXES or mesh.size == 1:
        return {}
    return dict(mesh.shape)
