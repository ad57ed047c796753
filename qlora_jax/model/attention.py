"""Attention: rotary positions, causal attention within windows and segments, and a step of it over cached keys and values.

Axes: B batch, T time, S keys, H query heads, K kv heads, G query heads a kv head, P head size, C chunk of queries.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from qlora_jax.model.architecture import Architecture, Kind, Rope
from qlora_jax.ops.operands import Rotation
from qlora_jax.ops.twins import plain_rotate

Attention = Literal["xla", "cudnn"]
Cache = tuple[jax.Array, jax.Array]  # keys and values seen so far, each [B, S, K, P]

QUERIES = 256
"""Queries whose scores exist at a time, where attention is computed by chunks."""
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that a query does not see: finite, so that a query that sees none (of padding) has a gradient."""


def default_attention(compute_dtype: jax.typing.DTypeLike, head_dim: int, *, on_gpu: bool | None = None) -> Attention:
    """cuDNN's fused attention where it can be used: on a GPU, in 16 bits, for head sizes that every generation serves; XLA's elsewhere.

    `on_gpu`: of a run that is only planned; by default JAX's backend, which is then started, is asked.
    """
    fits = jnp.dtype(compute_dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    on_gpu = jax.default_backend() == "gpu" if on_gpu is None else on_gpu
    return "cudnn" if on_gpu and fits else "xla"


def rotation(positions: jax.Array, rope: Rope) -> Rotation:
    """Rotary position embedding's angles at `positions` [B, T], in float32: bfloat16 could not tell position 257 from 256."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long is not None:
        is_long = jnp.max(positions) + 1 > rope.original
        frequencies = jnp.where(is_long, jnp.asarray(rope.long, jnp.float32), frequencies)
    angles = positions.reshape(-1, 1).astype(jnp.float32) * frequencies[None, :]
    if rope.scale == 1.0:
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    return Rotation(rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles))


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """x [B, T, heads, P] rotated to `positions` [B, T]; pairs are (i, i + P/2), Hugging Face's order."""
    return rotate_heads(x, rotation(positions, rope), rope)


def rotate_heads(x: jax.Array, angles: Rotation, rope: Rope) -> jax.Array:
    """Rotate the first features of each head of x [B, T, heads, P]; the others pass.

    Where pairs are interleaved, the result has them as halves: queries and keys alike, so that their products are the same.
    """
    size = 2 * len(rope.frequencies)
    turned, passed = x[..., :size], x[..., size:]
    if rope.interleaved:
        turned = jnp.concatenate([turned[..., 0::2], turned[..., 1::2]], axis=-1)
    turned = plain_rotate(turned.reshape(x.shape[0] * x.shape[1], -1), angles).reshape(turned.shape)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, passed], axis=-1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: Architecture,
    kind: Kind,
    segment_ids: jax.Array | None,
    implementation: Attention,
) -> jax.Array:
    """Attend causally from q [B, T, H, P] to k and v [B, T, K, P]: [B, T, H, P].

    A query sees keys of its own segment only, if `segment_ids` [B, T] are given, and no more than the kind's window, itself included.
    XLA's attention within a window shorter than the row costs the window and not the row; where scores are capped, or heads are too large
    for cuDNN, they exist for some queries at a time.
    """
    length = q.shape[1]
    window = kind.window if kind.window is not None and kind.window < length else None
    in_chunks = config.attention_softcap is not None or (window is not None and implementation == "xla")
    if in_chunks or (implementation == "xla" and config.head_dim > 128 and length > QUERIES):
        chunks = functools.partial(_attend_in_chunks, scale=config.attention_scale, softcap=config.attention_softcap)
        return chunks(q, k, v, window=window, segment_ids=segment_ids)
    mask = None
    if segment_ids is not None:  # packed rows: no token sees another row's
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, S]
    options = {} if window is None else {"local_window_size": (window - 1, 0)}
    scale = None if config.attention_scale == config.head_dim**-0.5 else config.attention_scale
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, scale=scale, implementation=implementation, **options
    )


def attend_cached(q: jax.Array, cache: Cache, positions: jax.Array, config: Architecture, kind: Kind) -> jax.Array:
    """Attend from q [B, T, H, P] at `positions` [B, T] to the cached keys and values [B, S, K, P]: [B, T, H, P]."""
    slots = jnp.arange(cache[0].shape[1])[None, None, None, :]
    at = positions[:, None, :, None]
    mask = slots <= at  # [B, 1, T, S]
    if kind.window is not None:
        mask &= slots > at - kind.window
    if config.attention_softcap is None:
        scale = None if config.attention_scale == config.head_dim**-0.5 else config.attention_scale
        return jax.nn.dot_product_attention(q, *cache, mask=mask, scale=scale, implementation="xla")
    return _weighed(q, *cache, mask[:, 0], config.attention_scale, config.attention_softcap)


def _attend_in_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """`attend`, some queries at a time, each chunk with the keys that it may see; recomputed in the backward pass."""
    batch, length, heads, size = q.shape
    chunk = min(length, QUERIES)
    number = -(-length // chunk)
    seen = length if window is None else min(length, chunk + window - 1)
    padding = number * chunk - length
    queries = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(batch, number, chunk, heads, size)
    segments = None
    if segment_ids is not None:
        segments = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1).reshape(batch, number, chunk)

    @jax.checkpoint
    def part(index: jax.Array, q: jax.Array, segment: jax.Array | None) -> jax.Array:
        first = index * chunk
        start = jnp.clip(first + chunk - seen, 0, length - seen)
        keys, values = (jax.lax.dynamic_slice_in_dim(each, start, seen, axis=1) for each in (k, v))
        t, s = (first + jnp.arange(chunk))[:, None], (start + jnp.arange(seen))[None, :]
        mask = s <= t if window is None else (s <= t) & (s > t - window)
        mask = jnp.broadcast_to(mask[None], (batch, chunk, seen))
        if segment is not None:
            others = jax.lax.dynamic_slice_in_dim(segment_ids, start, seen, axis=1)
            mask &= segment[:, :, None] == others[:, None, :]
        return _weighed(q, keys, values, mask, scale, softcap)

    parts = (jnp.arange(number), queries.swapaxes(0, 1), None if segments is None else segments.swapaxes(0, 1))
    out = jax.lax.map(lambda each: part(*each), parts)
    return out.swapaxes(0, 1).reshape(batch, number * chunk, heads, size)[:, :length]


def _weighed(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    """q [B, T, H, P], k and v [B, S, K, P], mask [B, T, S] → [B, T, H, P]; scores and their softmax in float32."""
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    scores = scale * jnp.einsum("btkgp,bskp->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskp->btkgp", weights.astype(v.dtype), v)
    return out.reshape(batch, length, heads, size)
