"""Noise on embeddings while training (NEFTune, arxiv.org/abs/2310.05914)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Layers fold their index into the same key, and there are never so many.
_KEY_OFFSET = 1 << 20


def neftune_noise(
    key: PRNGKeyArray,
    segment_ids: Int[Array, "B T"],
    *,
    features: int,
    alpha: float,
    max_segments: int | None,
    dtype: jnp.dtype,
) -> Float[Array, "B T D"]:
    """Returns uniform noise in +-alpha / sqrt(tokens of the document * features).

    The length is that of each document, not of its padded or packed row, as in the
    paper's code: packing does not change the size of the noise.

    Args:
      key: Of the micro-batch; layers may use it too.
      segment_ids: Document of each token, 0 for padding.
      features: Model size D.
      alpha: 5 to 15 in the paper.
      max_segments: Upper bound of the documents in a row; None when unknown.
      dtype: Of the noise.
    """
    most = segment_ids.shape[1] if max_segments is None else max_segments
    count = jax.vmap(lambda ids: jnp.bincount(ids, length=most + 1)[ids])
    tokens = count(segment_ids).astype(jnp.float32)
    scale = (alpha / jnp.sqrt(tokens * features)).astype(dtype)
    key = jax.random.fold_in(key, _KEY_OFFSET)
    shape = (*segment_ids.shape, features)
    return scale[..., None] * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
