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
from .xla import Added, Keys, Projections


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
    residual: Float[Array, "M _"] | None,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns the product of each projection, in the dtype of `x`.

    A residual is added to that of the only one.

    Raises:
      UnsupportedOp: The passes cannot run this case here.
    """
    passes.check(dropout_rate, x, projections, dropout_keys)
    added = () if residual is None else (residual,)
    return _group(passes, dropout_rate, len(added), x, projections, dropout_keys, added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _group(
    passes: Passes,
    dropout_rate: float,
    num_added: int,
    x: jax.Array,
    projections: Projections,
    dropout_keys: Keys,
    added: Added,
) -> tuple[jax.Array, ...]:
    return _forward(
        passes, dropout_rate, num_added, x, projections, dropout_keys, added
    )[0]


def _forward(
    passes: Passes,
    dropout_rate: float,
    num_added: int,
    x: jax.Array,
    projections: Projections,
    dropout_keys: Keys,
    added: Added,
) -> tuple[tuple[jax.Array, ...], Any]:
    del num_added
    return passes.forward(dropout_rate, x, projections, dropout_keys, added)


def _backward(
    passes: Passes,
    dropout_rate: float,
    num_added: int,
    residuals: Any,
    douts: tuple[jax.Array, ...],
) -> tuple[jax.Array, Projections, None, Added]:
    dx, gradients = passes.backward(dropout_rate, residuals, douts)
    return dx, gradients, None, douts[:num_added]


_group.defvjp(_forward, _backward)
