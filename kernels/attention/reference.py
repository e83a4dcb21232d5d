"""Attention in plain float32 with the whole score matrix: the definition of correct."""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .mask import visible

_MASKED = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_index: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B S"] | None,
    q_segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    softcap: float | None,
    scale: float,
    max_segments: int | None,
) -> Float[Array, "B T N H"]:
    """Returns `softmax(scale * q kᵀ) v` over visible keys, 0 where there is none."""
    del max_segments
    if q_index is None:
        q_index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    mask = visible(
        q_index,
        jnp.arange(k.shape[1], dtype=jnp.int32),
        q_segment_ids=q_segment_ids,
        segment_ids=segment_ids,
        window=window,
    )[:, None, None]
    q_btkgh = einops.rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    q_btkgh, k, v = (x.astype(jnp.float32) for x in (q_btkgh, k, v))
    scores = scale * _matmul("BTKGH,BSKH->BKGTS", q_btkgh, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
    weights = jnp.where(mask, weights, 0.0)
    out = _matmul("BKGTS,BSKH->BTKGH", weights, v)
    return einops.rearrange(out, "B T K G H -> B T (K G) H").astype(q.dtype)


def _matmul(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, precision=jax.lax.Precision.HIGHEST)
