"""Gradient of the rotary embedding: the rotation backwards.

Saved: only the tables, 4 H bytes a token, which all layers share; not q and k. The
tables are constants: they get no gradient.
"""

import jax
from jaxtyping import Array, Float, Float32

from . import reference


@jax.custom_vjp
def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float32[Array, "B T H//2"],
    sin: Float32[Array, "B T H//2"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Returns rotated q and k with the gradient of this file; see `api.rope`."""
    return reference.rope(q, k, cos, sin)


def _forward(
    q: Array, k: Array, cos: Array, sin: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return reference.rope(q, k, cos, sin), (cos, sin)


def _backward(
    residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    cos, sin = residuals
    dq, dk = reference.rope(*cotangents, cos, -sin)
    return dq, dk, None, None


rope.defvjp(_forward, _backward)
