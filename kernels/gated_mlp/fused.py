"""The gated network on Hopper, its adapters' products beside the unit's gradient.

Saved for the backward pass: `x`, gate and up (`RESIDUAL_NAMES`), 4 F bytes a token in
16 bits, and what `kernels.lora_matmul` saves of its adapters. The unit's result, which
the gradient of the last adapter reads, is made again where the cotangents of gate and
up are made, and with them all narrow products in one reading (`unit_cotangents`). Ranks
that this kernel does not take, and no adapter of gate or up, have the unit's gradient
from XLA and the adapters' kernels after it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.device import multiprocessors
from kernels.dispatch import UnsupportedOp
from kernels.lora_matmul import Projection
from kernels.lora_matmul import mosaic_gpu as lora
from kernels.lora_matmul.operands import scaled_down, up_rows, widths_of
from kernels.lora_matmul.xla import Added, Keys, Projections

from . import reference, vjp
from .unit_cotangents import suits, unit_cotangents
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
    out = jax.ShapeDtypeStruct((x.shape[0], down.weight.shape[0]), x.dtype)
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
    (width,) = widths_of((down,))
    if not width or width > MAX_RANK:
        return reference.gated_activation(gate, up, activation=activation), None
    narrow = scaled_down((down,), gate.dtype)
    return gated_unit_product(
        gate, up, narrow, activation=activation, blocks=multiprocessors()
    )


@jax.named_scope("lora_matmul")
def _backward(
    activation: str, num_added: int, residuals: Residuals, dy: jax.Array
) -> tuple[jax.Array, Projections, Projection, Added]:
    down = residuals.down
    dout, narrow = lora.input_cotangent((down,), residuals.xa, (dy,))
    with jax.named_scope("gated_mlp"):
        unit = _unit_gradient(activation, residuals, dout, narrow.dxa)
    (ddown,) = lora.gradients((down,), (dy,), [unit.da], narrow.db)
    dx, dgate_up = lora.backward(0.0, residuals.gate_up, unit.douts, unit.narrow)
    return dx, dgate_up, ddown, (dy,) * num_added


class _UnitGradient(NamedTuple):
    """What follows from the cotangent of the unit's result.

    Attributes:
      douts: Cotangents of gate and up.
      narrow: What their adapters need of them; None where it is still to be made.
      da: Cotangent of the last projection's `a`.
    """

    douts: tuple[jax.Array, jax.Array]
    narrow: lora.NarrowCotangents | None
    da: jax.Array | None


def _unit_gradient(
    activation: str, residuals: Residuals, dout: jax.Array, dxa: jax.Array | None
) -> _UnitGradient:
    (_, projections, xa), gate, up, down, _ = residuals
    gate_rank, up_rank = widths_of(projections)
    ranks = (gate_rank, up_rank, 0 if dxa is None else dxa.shape[1])
    if not suits(ranks):
        unit = functools.partial(vjp.gated_activation, activation=activation)
        out, pullback = jax.vjp(unit, gate, up)
        (da,) = lora.down_gradients(out, (down,), dxa)
        return _UnitGradient(pullback(dout), None, da)
    ups = [up_rows(p) * p.scale for p in projections if p.has_adapter]
    made = unit_cotangents(
        gate,
        up,
        dout,
        jnp.concatenate(ups).astype(dout.dtype),
        jnp.concatenate([own for own in (xa, dxa) if own is not None], axis=1),
        ranks=ranks,
        activation=activation,
        blocks=multiprocessors(),
    )
    *db, da = made.sums
    narrow = lora.NarrowCotangents(made.dxa, [*map(lora.up_gradient, projections, db)])
    return _UnitGradient((made.dgate, made.dup), narrow, lora.down_gradient(down, da))


_mlp.defvjp(_forward, _backward)
