"""KoLeo: spreads the features of a batch over the sphere."""

import jax
import jax.numpy as jnp

from omnistream_jax.losses.normalize import l2_normalize


def koleo_loss(features: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Minus the mean log distance from each normalised feature to its nearest other one.

    One term of L_ssl (OmniStream eq. 5, 11-15); Sablayrolles et al. 2019, as in DINOv2 and DINOv3, which call
    it once per global crop with that crop's CLS features before the head. Neighbours are sought over the
    global batch.

    Args:
        features: [B, D], B >= 2, any float dtype; they are L2-normalised here.
        eps: floor of the norms; added to every coordinate of the difference (the convention
            of PyTorch's PairwiseDistance), which keeps the gradient of two equal features finite;
            and added to the distance inside the logarithm.

    Returns:
        float32 scalar. Gradients flow into a feature and into its neighbour, not through the choice of it.

    Raises:
        ValueError: features that are not [B, D], or a batch of fewer than two.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected [batch, width], got shape {features.shape}")
    batch = features.shape[0]
    if batch < 2:
        raise ValueError(f"features: KoLeo needs a batch of at least 2 to have a neighbour, got {batch}")
    features = l2_normalize(features, eps)
    fixed = jax.lax.stop_gradient(features)
    similarity = jnp.matmul(fixed, fixed.T, precision=jax.lax.Precision.HIGHEST)
    # -inf, not DINOv3's -1: rounding can bring an opposite neighbour below -1, and then self would win.
    similarity = jnp.where(jnp.eye(batch, dtype=bool), -jnp.inf, similarity)
    nearest = jnp.argmax(similarity, axis=1)
    distance = jnp.linalg.norm(features - features[nearest] + eps, axis=-1)
    return -jnp.mean(jnp.log(distance + eps))
