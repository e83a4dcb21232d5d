"""The gradient rule of the LoRA products.

Saved for the backward pass: `x`, once for all projections; the weight as it is stored
(packed); the adapters; `scaling * x @ a`, 2 R bytes a token in 16 bits, which is what
`RESIDUAL_NAMES` names for `jax.checkpoint` policies; for DoRA one float32 number an
output. The float weight is made again, never saved: plain automatic differentiation
would keep every dequantised matrix of a scan over layers.
"""

import functools

import jax
from jaxtyping import Array, Float

from . import xla
from .xla import RESIDUAL_NAMES as RESIDUAL_NAMES
from .xla import Keys, Projections


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_matmul_group(
    dropout_rate: float,
    x: Float[Array, "M I"],
    projections: Projections,
    dropout_keys: Keys,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns the product of each projection, in the dtype of `x`."""
    return xla.forward(dropout_rate, x, projections, dropout_keys)[0]


def _backward(
    dropout_rate: float, residuals: xla.Residuals, douts: tuple[jax.Array, ...]
) -> tuple[jax.Array, Projections, None]:
    dx, gradients = xla.backward(dropout_rate, residuals, douts)
    return dx, gradients, None


lora_matmul_group.defvjp(xla.forward, _backward)
