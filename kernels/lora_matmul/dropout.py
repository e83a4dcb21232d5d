"""Inverted dropout whose mask can be made again from its key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

_LEVELS = 1 << 16


def dropped(
    x: Float[Array, "M I"], key: PRNGKeyArray | None, rate: float
) -> Float[Array, "M I"]:
    """Returns `x` with a fraction `rate` set to zero; `kept_scale` makes up for it.

    The function is linear in `x` and its own transpose, so the backward pass calls it
    again instead of keeping the mask. Without a key nothing is dropped.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(_kept(key, *x.shape, rate=rate), x, 0)


def kept_scale(key: PRNGKeyArray | None, rate: float) -> float:
    """Returns 1 / (share that `dropped` keeps), for the float32 product that follows.

    Multiplied into 16-bit activations it would itself be rounded, by up to 0.4 %, and
    the mean with it.
    """
    if key is None or rate == 0:
        return 1.0
    return _LEVELS / (_LEVELS - _dropped_levels(rate))


def _dropped_levels(rate: float) -> int:
    """Returns the rate in multiples of 1/65536, to which it is rounded."""
    return min(round(rate * _LEVELS), _LEVELS - 1)


def _kept(
    key: PRNGKeyArray, rows: int, columns: int, *, rate: float
) -> Bool[Array, "M I"]:
    """Returns a mask from 16 random bits an element.

    Two share a word of 32: asked for 16 bits, JAX draws 32 and throws half away.
    """
    words = jax.random.bits(key, (rows, -(-columns // 2)), jnp.uint32)
    levels = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(rows, -1)
    return levels[:, :columns] >= jnp.uint16(_dropped_levels(rate))
