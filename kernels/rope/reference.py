"""Rotary embedding in plain jnp: the definition of correct."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float32[Array, "B T H//2"],
    sin: Float32[Array, "B T H//2"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Returns q and k with each pair of features (i, i + H/2) rotated."""
    return rotated(q, cos, sin), rotated(k, cos, sin)


def rotated(
    x: Float[Array, "B T N H"],
    cos: Float32[Array, "B T H//2"],
    sin: Float32[Array, "B T H//2"],
) -> Float[Array, "B T N H"]:
    """Returns `(x1 cos - x2 sin, x2 cos + x1 sin)` for the halves x1, x2."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    halves = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)
