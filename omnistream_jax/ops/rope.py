"""Rotary positions in time and space (OmniStream Sec. 3.2, DINOv3).

A head of width D is rotated channel by channel: out = x cos(a) + rotate_half(x) sin(a), where rotate_half pairs
channel i with i + D/2. Each channel's angle is 2 pi coordinate / period. The layouts differ in which coordinate a
channel reads (q = D/4 channels wide each):

    dinov3      [y | x | y | x], then every fourth channel (i % 4 == 3) carries time: the paper's text
    released    [y | y | x | x], the same channels carry time: what the released weights were trained with; the two
                members of a pair turn by different angles, so it is no rotation
    dinov3_2d   [y | x | y | x], no time: DINOv3 itself

Spatial coordinates are cell centres mapped to [-1, 1]; time is the frame's index over `time_unit` frames.
Angles are float32 always.
"""

import jax
import jax.numpy as jnp

ROPE_LAYOUTS = ("dinov3", "released", "dinov3_2d")


def check_rope_layout(layout: str) -> None:
    """Raise ValueError unless `layout` is one of ROPE_LAYOUTS."""
    if layout not in ROPE_LAYOUTS:
        raise ValueError(f"rope: expected one of {', '.join(ROPE_LAYOUTS)}, got {layout!r}")


def _cell_centres(cells: int) -> jax.Array:
    return 2.0 * (jnp.arange(cells, dtype=jnp.float32) + 0.5) / cells - 1.0


def rope_tables(
    frame_index: jax.Array,
    height: int,
    width: int,
    *,
    head_width: int,
    special_tokens: int,
    layout: str,
    base: float = 100.0,
    time_unit: float = 16.0,
    scale: tuple[jax.Array | float, jax.Array | float] = (1.0, 1.0),
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every token of the given frames.

    Args:
        frame_index: [B, T] integers, each frame's index in its own stream (B = 1 serves a whole batch).
        height, width: patches of a frame along y and x.
        head_width: D, a multiple of 8.
        special_tokens: tokens before the patches of a frame, left unrotated (cos 1, sin 0).
        layout: one of ROPE_LAYOUTS.
        base: the longest period is base**(1 - 4/D).
        time_unit: frames per unit of the time coordinate.
        scale: factors on the time and on both spatial coordinates (the jitter of training).

    Returns:
        cos, sin: float32 [B, T, special_tokens + height * width, D].
    """
    check_rope_layout(layout)
    if head_width % 8:
        raise ValueError(f"rope: the head width must be a multiple of 8, got {head_width}")
    quarter = head_width // 4
    scale_time, scale_space = (jnp.asarray(s, jnp.float32).reshape(()) for s in scale)
    frequencies = 2.0 * jnp.pi / base ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)

    angle_y = (scale_space * _cell_centres(height))[:, None] * frequencies
    angle_x = (scale_space * _cell_centres(width))[:, None] * frequencies
    angle_y = jnp.broadcast_to(angle_y[:, None], (height, width, quarter))
    angle_x = jnp.broadcast_to(angle_x[None], (height, width, quarter))
    order = (angle_y, angle_y, angle_x, angle_x) if layout == "released" else (angle_y, angle_x) * 2
    angles = jnp.concatenate(order, -1).reshape(1, 1, height * width, head_width)
    batch, frames = frame_index.shape
    angles = jnp.broadcast_to(angles, (batch, frames, height * width, head_width))

    if layout != "dinov3_2d":
        time = scale_time * frame_index.astype(jnp.float32) / time_unit
        angle_time = time[..., None] * frequencies[: head_width // 8]  # [B, T, D/8]
        # Channel 3, 7, 11, ... of each half takes the time periods in order: one value per four channels.
        angle_time = jnp.repeat(jnp.tile(angle_time, 2), 4, axis=-1)[:, :, None]
        angles = jnp.where(jnp.arange(head_width) % 4 == 3, angle_time, angles)

    special = ((0, 0), (0, 0), (special_tokens, 0), (0, 0))
    return jnp.pad(jnp.cos(angles), special, constant_values=1.0), jnp.pad(jnp.sin(angles), special)


def apply_rope(tokens: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate tokens [B, T, P, H, D] by tables [B or 1, T, P, D]; computed in float32, returned in the input's dtype."""
    x = tokens.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = x * cos[..., None, :] + jnp.concatenate([-second, first], -1) * sin[..., None, :]
    return rotated.astype(tokens.dtype)


def random_scale(key: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """Training's jitter: factors (time, space) on the coordinates, log-uniform in [1 / largest, largest]."""
    limit = jnp.log(largest)
    time, space = jnp.exp(jax.random.uniform(key, (2,), minval=-limit, maxval=limit))
    return time, space
