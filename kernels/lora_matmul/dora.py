"""Column lengths of an adapted weight, without the adapted weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

_EXACT = jax.lax.Precision.HIGHEST


def column_norm(
    weight: Float[Array, "I O"],
    a: Float32[Array, "I R"],
    b: Float32[Array, "R O"],
    scale: Float32[Array, ""],
) -> Float32[Array, " O"]:
    """Returns the length of each column of `weight + scale * a @ b` in float32.

    The square is expanded, so that no second matrix of that size is made:
    |w|^2 + 2 s (A^T w) . b + s^2 b^T (A^T A) b.
    """
    squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0)
    cross = jnp.sum(_transposed_product(a, weight) * b, axis=0)
    gram = jnp.dot(a.T, a, precision=_EXACT)
    adapter = jnp.sum(jnp.dot(gram, b, precision=_EXACT) * b, axis=0)
    total = squares + 2 * scale * cross + scale**2 * adapter
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))


def _transposed_product(
    a: Float32[Array, "I R"], weight: Float[Array, "I O"]
) -> Float32[Array, "R O"]:
    """Returns `a^T @ weight` to float32 accuracy without a float32 copy of `weight`.

    `a` is a sum of three numbers of the weight's precision, each product exact.
    """
    if weight.dtype == jnp.float32:
        return jnp.dot(a.T, weight, precision=_EXACT)
    parts = []
    for _ in range(3):
        parts.append(jax.lax.optimization_barrier(a.astype(weight.dtype)))
        a = a - parts[-1].astype(jnp.float32)
    stacked = jnp.concatenate([part.T for part in parts])
    products = jnp.dot(stacked, weight, preferred_element_type=jnp.float32)
    return products.reshape(3, a.shape[1], -1).sum(axis=0)
