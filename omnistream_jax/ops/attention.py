"""Attention over frames, and over rows of text. B clips, T frames, P tokens a frame, H heads of width D.

Frame-causality (OmniStream eq. 3-4) is block-wise: a token sees all tokens of its own and of earlier frames,

    frame      0 1 2 3
    query 0    x . . .
    query 1    x x . .
    query 2    x x x .
    query 3    x x x x

so the queries of a frame meet a static prefix of the keys and no mask is needed. A window of W frames with S sinks
keeps the first S frames and the newest W - S of that prefix.

Which kernel computes it is chosen by `attention_path`: XLA's own products on a CPU, and everywhere in float32; cuDNN's
fused attention on NVIDIA; splash attention for clips on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.ops.cache import BlockCache, read_frames
from omnistream_jax.ops.cudnn import cudnn_attention
from omnistream_jax.ops.splash import splash_frame_causal
from omnistream_jax.utils.segments import SHARED

ATTENTION_PATHS = ("xla", "cudnn", "splash")

# Up to this many groups of frames are unrolled; longer clips put several frames in a group.
_UNROLLED_GROUPS = 16
# Of a decoder's rows: a row of more queries takes them in pieces.
_QUERIES_AT_ONCE, _PIECE = 1024, 256
# Keys of the cache that are read at once while streaming (measured on a CPU: ViT-B, 201 tokens a frame).
_CHUNK_TOKENS = 256


def attention_path(dtype: jnp.dtype, head_width: int, platform: str | None = None, capability: float = 0.0) -> str:
    """The fastest of ATTENTION_PATHS that computes heads of this width in `dtype`.

    Args:
        dtype: of the activations.
        head_width: D.
        platform: "cpu", "cuda", "tpu", ...; None: that of this process's devices, and their capability.
        capability: CUDA's compute capability of an NVIDIA GPU.
    """
    if platform is None:
        platform, capability = _platform()
    if platform == "cuda":
        return "cudnn" if _fits_cudnn(dtype, head_width, capability) else "xla"
    # Splash attention makes its gradients at the default precision, which is not float32's.
    return "splash" if platform == "tpu" and jnp.dtype(dtype).itemsize == 2 else "xla"


def _fits_cudnn(dtype: jnp.dtype, head_width: int, capability: float) -> bool:
    """cuDNN has no float32, nothing before Ampere (8.0), and wide heads from Hopper (9.0) on."""
    widest = 256 if capability >= 9 else 128 if capability >= 8 else 0
    return jnp.dtype(dtype).itemsize == 2 and head_width <= widest and head_width % 8 == 0


@functools.cache
def _platform() -> tuple[str, float]:
    device = jax.local_devices()[0]
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return "cuda", float(device.compute_capability)
    return device.platform, 0.0


def attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Softmax attention, the reference that faster paths are held to.

    Args:
        query: [B, N, H, D].
        key, value: [B, S, H, D].
        visible: bool, broadcastable to [B, H, N, S]; None shows every key. Each query must see at least one.

    Returns:
        [B, N, H, D] in the query's dtype; scores and softmax are float32.
    """
    scores = jnp.einsum("bnhd,bshd->bhns", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhns,bshd->bnhd", weights, value)


def segment_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    first_place: jax.Array | int = 0,
) -> jax.Array:
    """A decoder's attention: causal within segments, its query heads in groups that share keys and values.

    A query sees a key that stands at its own place in the row or before it, and is of its own segment, or of the image
    that its segment is about: 100 is that of 101 and 102 (utils/segments.py). Numbers below 100 stand alone.

        segment    100 101 101 102 200   0
        100          x   .   .   .   .   .
        101          x   x   .   .   .   .
        101          x   x   x   .   .   .
        102          x   .   .   x   .   .
        200          .   .   .   .   x   .
        0            .   .   .   .   .   x

    So a row may hold several texts about an image, each as if it stood there alone with it (multi-annotated images;
    Deitke et al. 2024, "Molmo and PixMo").

    Args:
        query: [B, N, H, D], already rotated.
        key, value: [B, S, K, D], H a multiple of K; the heads of a group are neighbours.
        query_segments, key_segments: int32 [B, N] and [B, S].
        first_place: of the first query among the keys; 0 where the queries are the keys' own tokens.

    Returns:
        [B, N, H, D] in the query's dtype; scores and softmax are float32. XLA's products on every platform; rows of
        many queries take them a piece at a time, so that memory grows with S and not with N * S.
    """

    def attend(query: jax.Array, segments: jax.Array, places: jax.Array) -> jax.Array:
        visible = jnp.arange(key.shape[1]) <= places[:, None]
        own, shared = segments[:, :, None], (segments - segments % SHARED)[:, :, None]
        seen = key_segments[:, None]
        visible = visible & ((seen == own) | ((seen == shared) & (seen > 0)))  # [B, N, S]
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], implementation="xla")

    count = query.shape[1]
    places = first_place + jnp.arange(count)
    if count <= _QUERIES_AT_ONCE:
        return attend(query, query_segments, places)
    filling = -count % _PIECE

    def pieces(tokens: jax.Array, axis: int) -> jax.Array:
        widths = [(0, filling if each == axis else 0) for each in range(tokens.ndim)]
        tokens = jnp.pad(tokens, widths)
        split = (*tokens.shape[:axis], -1, _PIECE, *tokens.shape[axis + 1 :])
        return jnp.moveaxis(tokens.reshape(split), axis, 0)

    each = (pieces(query, 1), pieces(query_segments, 1), pieces(places, 0))
    attended = jnp.moveaxis(jax.lax.map(lambda piece: jax.checkpoint(attend)(*piece), each), 0, 1)
    return attended.reshape(attended.shape[0], -1, *attended.shape[3:])[:, :count]


def check_window(window: int | None, sinks: int) -> None:
    """Raise ValueError unless the window holds its sinks and at least one more frame, the query's own."""
    for name, value in (("sinks", sinks), ("window", 1 if window is None else window)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise ValueError(f"{name}: expected a whole number of frames, got {value!r}")
    if sinks < 0:
        raise ValueError(f"sinks: expected a number of frames >= 0, got {sinks}")
    if window is not None and window < sinks + 1:
        raise ValueError(
            f"window: {window} frames cannot hold {sinks} sinks and the query's own frame; expected >= {sinks + 1}"
        )


def _frame_sees(query_frame: jax.Array, key_frame: jax.Array, window: int | None, sinks: int) -> jax.Array:
    causal = key_frame <= query_frame
    if window is None:
        return causal
    return causal & ((key_frame < sinks) | (key_frame > query_frame - (window - sinks)))


def _visible_prefix(tokens: jax.Array, frame: int, window: int | None, sinks: int) -> jax.Array:
    """The frames of [B, T, ...] that `frame` sees, as [B, visible, ...]."""
    start = 0 if window is None else max(sinks, frame + 1 - (window - sinks))
    if start <= sinks:
        return tokens[:, : frame + 1]
    return jnp.concatenate([tokens[:, :sinks], tokens[:, start : frame + 1]], axis=1)


def _flat(tokens: jax.Array) -> jax.Array:
    batch, frames, per_frame, *rest = tokens.shape
    return tokens.reshape(batch, frames * per_frame, *rest)


def frame_causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    sinks: int = 1,
    path: str = "xla",
) -> jax.Array:
    """Frame-causal attention of a whole clip, OmniStream eq. 3-4.

    Args:
        query, key, value: [B, T, P, H, D], already rotated.
        window: frames that a query sees, its own and the sinks included; None sees all earlier ones.
        sinks: first frames that stay visible under a window.
        path: one of ATTENTION_PATHS.

    Returns:
        [B, T, P, H, D].
    """
    check_window(window, sinks)
    if path == "splash":
        return splash_frame_causal(query, key, value, window=window, sinks=sinks)
    frames = query.shape[1]
    if frames <= _UNROLLED_GROUPS:
        attend = cudnn_attention if path == "cudnn" else attention
        outputs = [
            attend(
                query[:, t],
                _flat(_visible_prefix(key, t, window, sinks)),
                _flat(_visible_prefix(value, t, window, sinks)),
            )
            for t in range(frames)
        ]
        return jnp.stack(outputs, axis=1)

    per_group = -(-frames // _UNROLLED_GROUPS)
    outputs = []
    for start in range(0, frames, per_group):
        stop = min(start + per_group, frames)
        keys, values = key[:, :stop], value[:, :stop]
        if path == "cudnn" and window is None:
            one_frame = functools.partial(_frame_in_prefix_cudnn, keys, values)
        else:  # what a window leaves is no prefix, and a mask would cost cuDNN more than it saves
            one_frame = functools.partial(_frame_in_prefix, keys, values, window, sinks)
        group = jnp.moveaxis(query[:, start:stop], 1, 0)
        outputs.append(jax.lax.map(one_frame, (jnp.arange(start, stop), group)))
    return jnp.moveaxis(jnp.concatenate(outputs), 0, 1)


def _frame_in_prefix(keys, values, window, sinks, item) -> jax.Array:
    """One frame's queries [B, P, H, D] to the frames [B, T, P, H, D] that it sees; item: (its index, queries)."""
    frame, query = item
    keys_flat, values_flat = _flat(keys), _flat(values)
    sees = _frame_sees(frame, jnp.arange(keys_flat.shape[1]) // keys.shape[2], window, sinks)
    # Zeroed as well as masked: a NaN in a frame still to come would pass through its zero weight.
    return attention(query, keys_flat, jnp.where(sees[:, None, None], values_flat, 0), sees)


def _frame_in_prefix_cudnn(keys, values, item) -> jax.Array:
    frame, query = item
    lengths = jnp.full((query.shape[0],), (frame + 1) * keys.shape[2], jnp.int32)
    return cudnn_attention(query, _flat(keys), _flat(values), lengths)


def attend_cache(query: jax.Array, cache: BlockCache, visible_frames: jax.Array, *, path: str = "xla") -> jax.Array:
    """One frame's queries to the frames in a cache, at the cost of the frames that are there.

    Args:
        query: [B, P, H, D], rotated.
        cache: of one block, the present frame written.
        visible_frames: int32 [B], the first slots of the cache that each stream sees, at least 1.
        path: one of ATTENTION_PATHS.

    Returns:
        [B, P, H, D] in the query's dtype.
    """
    if path == "cudnn":
        keys, values = read_frames(cache, 0, cache.capacity, query.dtype)
        return cudnn_attention(query, _flat(keys), _flat(values), visible_frames * query.shape[1])
    return _attend_chunks(query, cache, visible_frames)


def _attend_chunks(query: jax.Array, cache: BlockCache, visible_frames: jax.Array) -> jax.Array:
    """A loop over chunks of the cache with a running softmax (Milakov and Gimelshein 2018; FlashAttention).

    It ends with the longest stream of the batch, whatever the capacity, and no scores larger than a chunk's are held.
    """
    batch, capacity, tokens, heads, width = cache.key.shape
    # Keeping the scores of a chunk small keeps them in the processor's cache.
    chunk = min(capacity, max(1, _CHUNK_TOKENS // tokens))
    scaled = jnp.swapaxes(query, 1, 2) * query.shape[-1] ** -0.5  # [B, H, P, D]

    def read(start: jax.Array) -> list[jax.Array]:  # keys and values, [B, H, chunk * P, D]
        # Each frame's axes are swapped before frames are joined: in bfloat16 XLA then keeps to its fast product.
        pieces = (jnp.swapaxes(piece, 2, 3) for piece in read_frames(cache, start, chunk, query.dtype))
        return [jnp.swapaxes(piece, 1, 2).reshape(batch, heads, chunk * tokens, width) for piece in pieces]

    def one_chunk(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, summed = carry
        # The last chunk is moved back where it would pass the end; frames that were seen already are hidden.
        start = jnp.minimum(i * chunk, capacity - chunk)
        keys, values = read(start)
        scores = jnp.einsum("bhpd,bhnd->bhpn", scaled, keys, preferred_element_type=jnp.float32)
        if batch > 1 or chunk > 1:  # one stream read frame by frame sees all that it reads
            frame = start + jnp.arange(chunk * tokens) // tokens
            visible = (frame >= i * chunk) & (frame < visible_frames[:, None])  # [B, chunk * P]
            scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_largest).astype(query.dtype)
        shrink = jnp.exp(largest - new_largest)
        seen = jnp.einsum("bhpn,bhnd->bhpd", weights, values, preferred_element_type=jnp.float32)
        total = total * shrink + weights.astype(jnp.float32).sum(-1, keepdims=True)
        return new_largest, total, summed * shrink + seen

    # Every stream sees its first slot, so the first chunk makes `largest` finite.
    shape = (batch, heads, tokens)
    start = (jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width)))
    chunks = (visible_frames.max() + chunk - 1) // chunk
    _, total, summed = jax.lax.fori_loop(0, chunks, one_chunk, start)
    return jnp.swapaxes(summed / total, 1, 2).astype(query.dtype)
