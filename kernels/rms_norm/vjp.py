"""Gradient of RMSNorm.

Saved: the normalised input (for `add_rms_norm` that is the sum, an output anyway) and
the weight: 2 D bytes a token in bf16. Recomputed: the reciprocal root, one reduction.
The weight gradient is summed over tokens in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import reference


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, offset: float
) -> Float[Array, "*B D"]:
    """Returns RMSNorm with the gradient of this file; see `api.rms_norm`."""
    return _rms_norm(x, weight, eps, offset)


def add_rms_norm(
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns (norm, sum) with the gradient of this file; see `api.add_rms_norm`."""
    return _add_rms_norm(x, residual, weight, eps, offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    return reference.rms_norm(x, weight, eps=eps, offset=offset)


def _forward(
    x: Array, weight: Array, eps: float, offset: float
) -> tuple[Array, tuple[Array, Array]]:
    return reference.rms_norm(x, weight, eps=eps, offset=offset), (x, weight)


def _backward(
    eps: float, offset: float, residuals: tuple[Array, Array], dout: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    dx, dweight = _gradients(x, weight, dout, eps, offset)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float, offset: float
) -> tuple[Array, Array]:
    return reference.add_rms_norm(x, residual, weight, eps=eps, offset=offset)


def _add_forward(
    x: Array, residual: Array, weight: Array, eps: float, offset: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    norm, total = reference.add_rms_norm(x, residual, weight, eps=eps, offset=offset)
    return (norm, total), (total, weight)


def _add_backward(
    eps: float,
    offset: float,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    total, weight = residuals
    dnorm, dtotal = cotangents
    dx, dweight = _gradients(total, weight, dnorm, eps, offset)
    dx = (dx + dtotal.astype(jnp.float32)).astype(total.dtype)
    return dx, dx, dweight.astype(weight.dtype)


def _gradients(
    x: Array, weight: Array, dout: Array, eps: float, offset: float
) -> tuple[Array, Array]:
    """Returns dx and dweight in float32."""
    x32, dout32 = x.astype(jnp.float32), dout.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    normed = x32 * rstd
    tokens = tuple(range(x.ndim - 1))
    dnormed = dout32 * jnp.expand_dims(offset + weight.astype(jnp.float32), tokens)
    projection = jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    return rstd * (dnormed - normed * projection), jnp.sum(dout32 * normed, axis=tokens)


_rms_norm.defvjp(_forward, _backward)
_add_rms_norm.defvjp(_add_forward, _add_backward)
