"""RMSNorm in plain jnp: the definition of correct."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, offset: float
) -> Float[Array, "*B D"]:
    """Returns `x / sqrt(mean(x²) + eps) * (offset + weight)`."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    gain = jnp.expand_dims(offset + weight.astype(jnp.float32), range(x.ndim - 1))
    return (x32 * lax.rsqrt(mean_square + eps) * gain).astype(x.dtype)


def add_rms_norm(
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"] | None,
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns the norm of `x + residual`, and that sum; None adds nothing."""
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps=eps, offset=offset), total
