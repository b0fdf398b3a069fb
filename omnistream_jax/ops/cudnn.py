"""cuDNN's fused attention on NVIDIA, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Softmax attention; no mask is ever passed, because cuDNN would read it as an additive bias (2.6 times slower).

    Args:
        query: [B, N, H, D], bfloat16 or float16, D a multiple of 8.
        key, value: [B, S, H, D], of the same type.
        key_lengths: int32 [B], the first keys that each example sees; None shows all.

    Returns:
        [B, N, H, D].
    """
    batch, queries = query.shape[:2]
    keys = key.shape[1]
    if queries % 2 or keys % 2:  # odd lengths have no backward pass (201 tokens a frame at 224 pixels)
        query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
        if key_lengths is None:
            key_lengths = jnp.full((batch,), keys, jnp.int32)
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=None if key_lengths is None else jnp.full((batch,), queries, jnp.int32),
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return out[:, :queries]
