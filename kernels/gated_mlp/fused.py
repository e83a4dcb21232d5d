"""The gated network on Hopper, its unit's gradient in the epilogue of a product.

Saved for the backward pass: `x`, gate and up (`RESIDUAL_NAMES`), 4 F bytes a token in
16 bits, and what `kernels.lora_matmul` saves of its adapters. The unit's result, which
the gradient of the last adapter reads, is made again in the same epilogue that makes
the cotangents of gate and up: the cotangent of the result itself is never in memory.
"""

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels.device import multiprocessors
from kernels.dispatch import UnsupportedOp
from kernels.lora_matmul import Projection
from kernels.lora_matmul import mosaic_gpu as lora
from kernels.lora_matmul.operands import is_packed, scaled_down
from kernels.lora_matmul.xla import Added, Keys, Projections

from . import mosaic_gpu_vjp, reference
from .mosaic_gpu_vjp import gated_cotangents
from .unit_product import MAX_RANK, gated_unit_product
from .vjp import RESIDUAL_NAMES

GateUp = tuple[Projection, Projection]


class Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      gate_up: Those of both projections.
      gate: (M, F).
      up: (M, F).
      down: The last projection.
      xa: Of its adapter, as in `kernels.lora_matmul`.
    """

    gate_up: lora.Residuals
    gate: jax.Array
    up: jax.Array
    down: Projection
    xa: jax.Array | None


def gated_mlp(
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
    """Returns `down(act(gate(x)) * up(x)) + residual`.

    Raises:
      UnsupportedOp: Another device, or what the kernels lack.
    """
    if product_implementation not in (None, "mosaic_gpu"):
        raise UnsupportedOp(f"lora_matmul is to run by {product_implementation!r}")
    if len(gate_up) != 2:
        raise UnsupportedOp("gate and up are one weight")
    if x.shape[0] <= lora.MAX_ROWS:
        raise UnsupportedOp(f"{x.shape[0]} rows are few: {lora.MAX_ROWS} or less")
    features, multiple = down.weight.shape[0], mosaic_gpu_vjp.TILES.tile_n
    if features % multiple:
        raise UnsupportedOp(f"{features=} must be a multiple of {multiple}")
    out = jax.ShapeDtypeStruct((x.shape[0], features), x.dtype)
    keys = dropout_keys if dropout_rate else (None,) * len(dropout_keys)
    lora.check(dropout_rate, x, gate_up, keys[:-1])
    lora.check(dropout_rate, out, (down,), keys[-1:])
    added = () if residual is None else (residual,)
    return _mlp(activation, len(added), x, gate_up, down, added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(
    activation: str,
    num_added: int,
    x: jax.Array,
    gate_up: GateUp,
    down: Projection,
    added: Added,
) -> jax.Array:
    return _forward(activation, num_added, x, gate_up, down, added)[0]


@jax.named_scope("lora_matmul")
def _forward(
    activation: str,
    num_added: int,
    x: jax.Array,
    gate_up: GateUp,
    down: Projection,
    added: Added,
) -> tuple[jax.Array, Residuals]:
    del num_added
    (gate, up), saved = lora.many_rows_forward(x, gate_up, ())
    gate, up = map(checkpoint_name, (gate, up), RESIDUAL_NAMES)
    with jax.named_scope("gated_mlp"):
        out, xa = _unit(gate, up, down, activation)
    (y,), residuals = lora.many_rows_forward(out, (down,), added, xa)
    return y, Residuals(saved, gate, up, down, residuals.xa)


def _unit(
    gate: jax.Array, up: jax.Array, down: Projection, activation: str
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the unit, and its product with the adapter if one kernel makes both."""
    narrow = scaled_down((down,), gate.dtype)
    if narrow is None or narrow.shape[0] > MAX_RANK:
        return reference.gated_activation(gate, up, activation=activation), None
    return gated_unit_product(
        gate, up, narrow, activation=activation, blocks=multiprocessors()
    )


@jax.named_scope("lora_matmul")
def _backward(
    activation: str, num_added: int, residuals: Residuals, dy: jax.Array
) -> tuple[jax.Array, Projections, Projection, Added]:
    saved, gate, up, down, xa = residuals
    terms, narrow = lora.input_terms((down,), xa, (dy,))
    dgate, dup, out = gated_cotangents(
        terms,
        gate,
        up,
        activation=activation,
        is_transposed=not is_packed(down),
        blocks=multiprocessors(),
    )
    (ddown,) = lora.gradients(out, (down,), (dy,), narrow)
    dx, dgate_up = lora.backward(0.0, saved, (dgate, dup))
    return dx, dgate_up, ddown, (dy,) * num_added


_mlp.defvjp(_forward, _backward)
