"""The first half of an adapter's branch, for a product that is not a projection."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from .dropout import dropped, kept_scale
from .products import product


def scaled_down_product(
    x: Float[Array, "M I"],
    a: Float[Array, "I R"],
    *,
    scaling: Float32[Array, ""] | float,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "M R"]:
    """Returns `scaling * dropout(x) @ a`, rounded once to the dtype of `x`.

    The gradient of `a` is accumulated in float32. `x` and `a` are kept for it.

    Args:
      x: Activations.
      a: Down projection; the product takes it in the dtype of `x`.
      scaling: Of the adapter; not differentiated.
      dropout_rate: Share of `x` that is dropped.
      dropout_key: None drops nothing.
    """
    scale = jnp.float32(scaling) * kept_scale(dropout_key, dropout_rate)
    return _down(dropout_rate, x, a, scale, dropout_key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _down(
    rate: float, x: jax.Array, a: jax.Array, scale: jax.Array, key: jax.Array | None
) -> jax.Array:
    down = product(dropped(x, key, rate), a.astype(x.dtype), jnp.float32)
    return (scale * down).astype(x.dtype)


def _forward(
    rate: float, x: jax.Array, a: jax.Array, scale: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, tuple]:
    return _down(rate, x, a, scale, key), (x, a, scale, key)


def _backward(
    rate: float, residuals: tuple, dout: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    x, a, scale, key = residuals
    da = scale * product(dropped(x, key, rate).T, dout, jnp.float32)
    dx = scale * product(dout, a.astype(dout.dtype).T, jnp.float32)
    return dropped(dx.astype(x.dtype), key, rate), da.astype(a.dtype), None, None


_down.defvjp(_forward, _backward)
