"""The gradient rule of the LoRA products.

Saved for the backward pass: `x`, once for all projections; the weight as it is stored
(packed); the adapters; `scaling * x @ a`, 2 R bytes a token in 16 bits, which is what
`RESIDUAL_NAMES` names for `jax.checkpoint` policies; for DoRA one float32 number an
output. The float weight is made again, never saved: plain automatic differentiation
would keep every dequantised matrix of a scan over layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from . import mosaic_gpu, xla
from .xla import RESIDUAL_NAMES as RESIDUAL_NAMES
from .xla import Keys, Projections


@dataclass(frozen=True, kw_only=True)
class Passes:
    """An implementation: what it refuses, its forward and its backward pass."""

    check: Callable[..., None]
    forward: Callable[..., tuple[tuple[jax.Array, ...], Any]]
    backward: Callable[..., tuple[jax.Array, Projections]]


XLA = Passes(check=lambda *arguments: None, forward=xla.forward, backward=xla.backward)
MOSAIC_GPU = Passes(
    check=mosaic_gpu.check, forward=mosaic_gpu.forward, backward=mosaic_gpu.backward
)


def lora_matmul_group(
    passes: Passes,
    dropout_rate: float,
    x: Float[Array, "M I"],
    projections: Projections,
    dropout_keys: Keys,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns the product of each projection, in the dtype of `x`.

    Raises:
      UnsupportedOp: The passes cannot run this case here.
    """
    passes.check(dropout_rate, x, projections, dropout_keys)
    return _group(passes, dropout_rate, x, projections, dropout_keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _group(
    passes: Passes,
    dropout_rate: float,
    x: jax.Array,
    projections: Projections,
    dropout_keys: Keys,
) -> tuple[jax.Array, ...]:
    return passes.forward(dropout_rate, x, projections, dropout_keys)[0]


def _forward(
    passes: Passes,
    dropout_rate: float,
    x: jax.Array,
    projections: Projections,
    dropout_keys: Keys,
) -> tuple[tuple[jax.Array, ...], Any]:
    return passes.forward(dropout_rate, x, projections, dropout_keys)


def _backward(
    passes: Passes, dropout_rate: float, residuals: Any, douts: tuple[jax.Array, ...]
) -> tuple[jax.Array, Projections, None]:
    dx, gradients = passes.backward(dropout_rate, residuals, douts)
    return dx, gradients, None


_group.defvjp(_forward, _backward)
