"""Muon (Jordan et al. 2024): a matrix moves along the orthogonal matrix that is nearest to its momentum.

The matrices are those of the backbone's and the decoder's blocks, one a block, and the projector's; queries, keys and
values have one each, over all heads. Everything else (embeddings of patches and tokens, norms, biases, heads,
prototypes) is no matrix, or is an input's or an output's, and takes Adam, as its authors advise.
"""

import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from omnistream_jax.utils.trees import leaf_name

MOMENTUM = 0.95
UPDATE_RMS = 0.2
"""Root mean square of an update at a rate of 1: like Adam's, so that both take one rate (Liu et al. 2025, eq. 4)."""
MATRICES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    # Pattern of the name, axes of inputs, axes of outputs; blocks are stacked.
    # The backbone's: [L, d, 3, H, D], [L, H, D, d], [L, d, hidden], [L, hidden, d].
    (r"blocks/attention/qkv_kernel", (1,), (3, 4)),
    (r"blocks/attention/projection/kernel", (1, 2), (3,)),
    (r"blocks/mlp/(hidden|gate|output)/kernel", (1,), (2,)),
    # The decoder's: [L, D, H or K, W], [L, H, W, D], [L, D, hidden], [L, hidden, D].
    (r"blocks/(query|key|value)/kernel", (1,), (2, 3)),
    (r"blocks/projection/kernel", (1, 2), (3,)),
    (r"blocks/(gate|up|down)/kernel", (1,), (2,)),
    (r"projector/mlp_[01]/kernel", (0,), (1,)),
)
_COMPILED = tuple(
    (re.compile(rf"(?:.*/)?{pattern}"), MuonDimensionNumbers(inputs, outputs)) for pattern, inputs, outputs in MATRICES
)


def muon(learning_rate: optax.Schedule, beta1: float, beta2: float) -> optax.GradientTransformation:
    """Muon for `MATRICES` and Adam with beta1 and beta2 for the rest, both at one learning rate; no weight decay.

    Both look ahead along their momentum (Nesterov). Five Newton-Schulz iterations come near the orthogonal matrix: most
    singular values lie between 0.7 and 1.2.
    """
    return optax.contrib.muon(
        learning_rate,
        beta=MOMENTUM,
        consistent_rms=UPDATE_RMS,
        muon_weight_dimension_numbers=_matrices,
        adam_b1=beta1,
        adam_b2=beta2,
    )


def _matrices(params: Any) -> Any:
    """The axes of every parameter that is a matrix, None for what is not."""

    def axes(path: tuple, _: jax.Array) -> MuonDimensionNumbers | None:
        name = leaf_name(path)
        return next((numbers for pattern, numbers in _COMPILED if pattern.fullmatch(name)), None)

    return jax.tree_util.tree_map_with_path(axes, params)
