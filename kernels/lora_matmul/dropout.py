"""Inverted dropout whose mask can be made again from its key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropped(
    x: Float[Array, "*S"], key: PRNGKeyArray | None, rate: float
) -> Float[Array, "*S"]:
    """Returns `x` with a fraction `rate` set to zero and the rest scaled up.

    The function is linear in `x` and its own transpose, so the backward pass calls it
    again instead of keeping the mask. Without a key nothing is dropped.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)
