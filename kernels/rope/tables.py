"""Cosines and sines of rotary angles."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def rotary_tables(
    positions: Int[Array, "B T"],
    inv_freq: Float[Array | np.ndarray, " half"],
    *,
    scale: float = 1.0,
) -> tuple[Float32[Array, "B T half"], Float32[Array, "B T half"]]:
    """Returns `scale` times cos and sin of `positions * inv_freq`, in float32.

    Args:
      positions: Place of each token in its document, from 0; it restarts with each
        document of a packed row.
      inv_freq: Angle per position for each pair of features, H / 2 of them.
      scale: Attention factor of scaled embeddings (arxiv.org/abs/2309.00071); q and k
        each grow by it.
    """
    frequencies = jnp.asarray(inv_freq).astype(jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return scale * jnp.cos(angles), scale * jnp.sin(angles)
