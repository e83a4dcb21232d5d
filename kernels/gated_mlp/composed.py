"""The gated network as its three ops, one after the other."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.lora_matmul import Projection, lora_matmul_group
from kernels.lora_matmul.xla import Keys, Projections

from .vjp import RESIDUAL_NAMES


def gated_mlp(
    unit: Callable[..., jax.Array],
    x: jax.Array,
    gate_up: Projections,
    down: Projection,
    *,
    activation: str,
    residual: jax.Array | None,
    dropout_rate: float,
    dropout_keys: Keys,
    product_implementation: str | None,
) -> jax.Array:
    """Returns `down(unit(gate(x), up(x))) + residual`.

    Args:
      unit: Takes gate, up and `activation`.
      x: (M, D).
      gate_up: Two projections or a merged one.
      down: Of the unit's result.
      activation: As in `gated_activation`.
      residual: (M, D).
      dropout_rate: Of the adapters' inputs.
      dropout_keys: One for each projection, that of `down` last.
      product_implementation: Of `lora_matmul`.
    """

    products = functools.partial(
        lora_matmul_group,
        dropout_rate=dropout_rate,
        implementation=product_implementation,
    )
    rows = products(x, gate_up, dropout_keys=dropout_keys[:-1])
    out = unit_of(unit, rows, activation=activation)
    (y,) = products(out, (down,), residual=residual, dropout_keys=dropout_keys[-1:])
    return y


def unit_of(
    unit: Callable[..., jax.Array], rows: Sequence[jax.Array], *, activation: str
) -> jax.Array:
    """Returns the unit of gate and up, or of the two in one, under `RESIDUAL_NAMES`."""
    gate, up = jnp.split(rows[0], 2, axis=-1) if len(rows) == 1 else rows
    gate, up = map(checkpoint_name, (gate, up), RESIDUAL_NAMES)
    return unit(gate, up, activation=activation)
