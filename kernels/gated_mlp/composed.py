"""The gated network as its three ops, one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.lora_matmul import Projection, lora_matmul_group

from .vjp import RESIDUAL_NAMES

Keys = tuple[jax.Array | None, ...]


def gated_mlp(
    unit: Callable[..., jax.Array],
    x: jax.Array,
    gate_up: tuple[Projection, ...],
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

    def products(
        x: jax.Array,
        projections: tuple[Projection, ...],
        keys: Keys,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        return lora_matmul_group(
            x,
            projections,
            residual=residual,
            dropout_rate=dropout_rate,
            dropout_keys=keys,
            implementation=product_implementation,
        )

    rows = products(x, gate_up, dropout_keys[:-1])
    gate, up = jnp.split(rows[0], 2, axis=-1) if len(rows) == 1 else rows
    gate, up = map(checkpoint_name, (gate, up), RESIDUAL_NAMES)
    out = unit(gate, up, activation=activation)
    (y,) = products(out, (down,), dropout_keys[-1:], residual)
    return y
