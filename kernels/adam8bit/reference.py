"""Adam with 8-bit states in plain jnp: the definition of correct."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from .blocks import LEAST_SCALE, MU_MAP, NU_MAP, Blocks


def adam8bit(
    gradient: Float32[Array, "blocks 256"],
    mu: Blocks,
    nu: Blocks,
    corrections: Float32[Array, " 2"],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[Float32[Array, "blocks 256"], Blocks, Blocks]:
    """Returns the direction and both moments; see `api.adam8bit`.

    Args:
      gradient: In blocks.
      mu: First moment.
      nu: Second moment.
      corrections: Factors of the first moment and of the second one's root.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
    """
    new_mu = b1 * decode(mu, MU_MAP) + (1 - b1) * gradient
    new_nu = b2 * decode(nu, NU_MAP) + (1 - b2) * jnp.square(gradient)
    direction = corrections[0] * new_mu / (corrections[1] * jnp.sqrt(new_nu) + eps)
    return direction, encode(new_mu, MU_MAP), encode(new_nu, NU_MAP)


def decode(blocks: Blocks, values: np.ndarray) -> Float32[Array, "blocks 256"]:
    """Returns what the codes stand for."""
    return jnp.asarray(values)[blocks.codes] * blocks.absmax[:, None]


def encode(x: Float32[Array, "blocks 256"], values: np.ndarray) -> Blocks:
    """Returns the nearest codes, half way the lower one; zeros have scale 1."""
    absmax = jnp.abs(x).max(axis=1)
    absmax = jnp.where(absmax < LEAST_SCALE, 1, absmax)
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    codes = _midpoints_below(x / absmax[:, None], midpoints)
    return Blocks(codes=codes, absmax=absmax)


def _midpoints_below(x: jax.Array, midpoints: np.ndarray) -> UInt8[Array, "*S"]:
    return jnp.searchsorted(jnp.asarray(midpoints), x).astype(jnp.uint8)
