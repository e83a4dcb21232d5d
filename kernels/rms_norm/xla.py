"""RMSNorm by XLA's own fusions: the forward is the reference, the gradient is here."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def gradients(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    dout: Float[Array, "*B D"],
    dtotal: Float[Array, "*B D"] | None,
    *,
    eps: float,
    offset: float,
    wants_dweight: bool,
) -> tuple[Float[Array, "*B D"], Float32[Array, " D"] | None]:
    """Returns (dx + dtotal) in the dtype of `x`, and dweight if wanted."""
    x32, dout32 = x.astype(jnp.float32), dout.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    normed = x32 * rstd
    tokens = tuple(range(x.ndim - 1))
    dnormed = dout32 * jnp.expand_dims(offset + weight.astype(jnp.float32), tokens)
    projection = jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    dx = rstd * (dnormed - normed * projection)
    if dtotal is not None:
        dx += dtotal.astype(jnp.float32)
    dweight = jnp.sum(dout32 * normed, axis=tokens) if wants_dweight else None
    return dx.astype(x.dtype), dweight
