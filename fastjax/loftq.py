"""Adapters that start from what 4 bits lose of each weight (LoftQ, 2310.08659)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

_SPARE = 8
_ITERATIONS = 6


@functools.partial(jax.jit, static_argnames=("rank",))
def low_rank_start(
    lost: Float[Array, "I O"], key: PRNGKeyArray, *, rank: int
) -> tuple[Float[Array, "I R"], Float[Array, "R O"]]:
    """Returns float32 factors whose product is nearly the best of this rank.

    By subspace iteration with `_SPARE` more directions than wanted (0909.4061,
    algorithm 4.4): the loss of rounding is close to noise, whose singular values
    hardly fall, so a few iterations matter more than their exactness.

    Args:
      lost: Weight less its 4-bit form.
      key: Of the first directions.
      rank: R.
    """
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    width = min(rank + _SPARE, *lost.shape)
    start = jax.random.normal(key, (lost.shape[1], width), jnp.float32)
    basis = jnp.linalg.qr(multiply(lost, start))[0]
    for _ in range(_ITERATIONS):
        other = jnp.linalg.qr(multiply(lost.T, basis))[0]
        basis = jnp.linalg.qr(multiply(lost, other))[0]
    left, values, right = jnp.linalg.svd(multiply(basis.T, lost), full_matrices=False)
    half = jnp.sqrt(values[:rank])
    return multiply(basis, left[:, :rank]) * half[None], right[:rank] * half[:, None]
