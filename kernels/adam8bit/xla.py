"""Adam with 8-bit states by XLA: one table look-up to read a code, one to find it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from .blocks import LEAST_SCALE, MU_MAP, NU_MAP, Blocks
from .ranks import MU_RANKS, NU_RANKS, Ranks
from .reference import decode


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
    """Returns what the reference does; half way between values the smaller code."""
    new_mu = b1 * decode(mu, MU_MAP) + (1 - b1) * gradient
    new_nu = b2 * decode(nu, NU_MAP) + (1 - b2) * jnp.square(gradient)
    direction = corrections[0] * new_mu / (corrections[1] * jnp.sqrt(new_nu) + eps)
    return direction, encode(new_mu, MU_RANKS), encode(new_nu, NU_RANKS)


def encode(x: Float32[Array, "blocks 256"], ranks: Ranks) -> Blocks:
    """Returns the codes nearest to the values, by block; zeros have scale 1."""
    absmax = jnp.abs(x).max(axis=1)
    absmax = jnp.where(absmax < LEAST_SCALE, 1, absmax)
    return Blocks(codes=codes_of(x / absmax[:, None], ranks), absmax=absmax)


def codes_of(x: Float32[Array, "*S"], ranks: Ranks) -> UInt8[Array, "*S"]:
    """Returns the codes nearest to values from -1 to 1."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    cell = jnp.clip((bits >> ranks.shift) - ranks.first, 0, ranks.entries.size - 1)
    entry = jnp.asarray(ranks.entries).at[cell].get(mode="promise_in_bounds")
    rank = (entry + (bits & ranks.trailing)) >> ranks.shift
    if zero := ranks.zero_code:
        rank = jnp.where(x < 0, zero - jnp.minimum(rank, zero), zero + rank)
    return rank.astype(jnp.uint8)
