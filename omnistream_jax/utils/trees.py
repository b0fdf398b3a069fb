"""Names and fingerprints of the arrays in a tree of state."""

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {
    1: jnp.uint8,
    2: jnp.uint16,
    4: jnp.uint32,
    8: jnp.uint32,
}  # bytes of an element -> what it is read as


def leaf_name(path: tuple) -> str:
    """The name of the leaf at a path of jax.tree_util, as in "params/block/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: object) -> dict[str, object]:
    """Leaves of a tree by name, in the tree's order: {"params/block/kernel": leaf, ...}; None is no leaf.

    Raises ValueError where two leaves would bear one name, "." and "/" counted as the same sign.
    """
    leaves = {}
    seen = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = leaf_name(path)
        if (other := seen.setdefault(name.replace("/", "."), name)) != name or name in leaves:
            raise ValueError(f"two leaves of the tree have the name {name!r} (the other: {other!r})")
        leaves[name] = leaf
    return leaves


def nest(leaves: dict[str, object]) -> dict[str, object]:
    """{"a/b": leaf} as the nested dictionary {"a": {"b": leaf}}."""
    nested: dict[str, object] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def describe(leaf: object) -> str:
    """Shape and type of a leaf, as in "float32[3,4]"."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def fingerprint(tree: object) -> dict[str, int]:
    """One 32-bit number per array, equal only where the bits are: {name: number}.

    The sum over elements of value * weight(index) modulo 2^32, the value being the element's bits and the
    weight an odd hash of its position in row-major order. As odd numbers have inverses modulo 2^32, one
    changed element always changes the sum; swapped rows change it too. Integer addition has no order, so any
    sharding gives the same number.
    """
    sums = {name: _leaf_sum(leaf) for name, leaf in named_leaves(tree).items()}
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _leaf_sum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    return jnp.sum(words * _weights(words.shape), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as uint32, with a last axis of 2 for elements of 8 bytes."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)


def _weights(shape: tuple[int, ...]) -> jax.Array:
    """Odd uint32 weights: the row-major index through a mixer of 32 bits (Wellons' lowbias32)."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    index = (index ^ (index >> 16)) * jnp.uint32(0x7FEB352D)
    index = (index ^ (index >> 15)) * jnp.uint32(0x846CA68B)
    return (index ^ (index >> 16)) | jnp.uint32(1)
