"""The products of the forward and the backward pass, as XLA runs them best."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ALIGNMENT = 8


def product(
    lhs: Float[Array, "M C"],
    rhs: Float[Array, "C N"],
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "M N"]:
    """Returns `lhs @ rhs`, accumulated in float32 and rounded once to `dtype`.

    Devices accumulate products of 16-bit numbers in float32 whatever the result's
    dtype is. Float32 inputs take no TF32 shortcut.
    """
    is_float32 = lhs.dtype == jnp.float32
    return jnp.dot(
        lhs,
        rhs,
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=dtype or lhs.dtype,
    )


def extension(parts: Sequence[Float[Array, "M _"]]) -> Float[Array, "M C"]:
    """Joins columns and fills up with zeros to a width that tensor cores can load."""
    joined = jnp.concatenate(parts, axis=1)
    return jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % _ALIGNMENT)))


def sum_of_products(
    lhs: Sequence[Float[Array, "M _"]],
    rhs: Sequence[Float[Array, "_ N"]],
    *,
    is_joined: bool,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "M N"]:
    """Returns the sum of `lhs[i] @ rhs[i]`.

    Joined along the contracted axis they are one product: one accumulation in float32,
    one rounding, and no reading and writing of the result for each term, but a copy of
    each `lhs`.
    """
    if not is_joined:
        terms = [
            product(left, right, dtype) for left, right in zip(lhs, rhs, strict=True)
        ]
        return sum(terms[1:], terms[0])
    joined = extension(lhs)
    rows = jnp.concatenate(rhs)
    rows = jnp.pad(rows, ((0, joined.shape[1] - rows.shape[0]), (0, 0)))
    return product(joined, rows, dtype)
