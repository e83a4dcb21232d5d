"""The gated network on Hopper, its adapters' products beside the unit's gradient.

Saved for the backward pass: `x`, gate and up (`RESIDUAL_NAMES`), 4 F bytes a token in
16 bits, and what `kernels.lora_matmul` saves of its adapters. The unit's result, which
the gradient of the last adapter reads, is made again where the cotangents of gate and
up are made, and with them all narrow products in one reading (`unit_cotangents`). Ranks
that this kernel does not take, and no adapter of gate or up, have the unit's gradient
from XLA and the adapters' kernels after it.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels.device import multiprocessors
from kernels.dispatch import UnsupportedOp
from kernels.joint_launch import Work
from kernels.lora_matmul import Projection
from kernels.lora_matmul import mosaic_gpu as lora
from kernels.lora_matmul.narrow import Part, narrow_work
from kernels.lora_matmul.operands import (
    scaled_down,
    starts_of,
    summed_up,
    up_rows,
    widths_of,
)
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
    down, gate_up = residuals.down, residuals.gate_up
    parts = lora.narrow_parts((down,), residuals.xa, (dy,))
    gate_rank, up_rank, rank = widths_of((*gate_up.projections, down))
    ranks = gate_rank, up_rank, rank
    if suits(ranks):
        dx, dgate_up, da, db = _joint_backward(activation, residuals, dy, parts, ranks)
    else:
        dout, narrow, _ = lora.input_cotangent((down,), (dy,), parts)
        with jax.named_scope("gated_mlp"):
            unit = functools.partial(vjp.gated_activation, activation=activation)
            out, pullback = jax.vjp(unit, residuals.gate, residuals.up)
            douts = pullback(dout)
        (da,), db = lora.down_gradients(out, (down,), narrow.dxa), narrow.db
        dx, dgate_up = lora.backward(0.0, gate_up, douts)
    (ddown,) = lora.gradients((down,), (dy,), [da], db)
    return dx, dgate_up, ddown, (dy,) * num_added


def _joint_backward(
    activation: str,
    residuals: Residuals,
    dy: jax.Array,
    parts: lora.NarrowParts,
    ranks: tuple[int, int, int],
) -> tuple[jax.Array, Projections, jax.Array | None, list[jax.Array | None]]:
    """Returns dx, what gate and up train, and da and db of the last projection.

    What `unit_cotangents` reads is laid out beside one dequantisation, what it leaves
    in parts is added up beside the next one.
    """
    (x, gate_up, xa), gate, up, down, _ = residuals
    assert xa is not None
    dout, narrow, ((ups,), (both,)) = lora.input_cotangent(
        (down,), (dy,), parts, beside=_unit_operands(gate_up, xa, parts.dxa, dy.dtype)
    )
    with jax.named_scope("gated_mlp"):
        unit = unit_cotangents(
            gate,
            up,
            dout,
            ups,
            both,
            ranks=ranks,
            activation=activation,
            blocks=multiprocessors(),
        )
    dxa = Part(source=unit.dxa, is_long_first=True)
    starts = itertools.pairwise(itertools.accumulate(ranks, initial=0))
    *db, da = (
        Part(source=unit.sums, is_long_first=True, columns=range(start, end))
        if start < end
        else None
        for start, end in starts
    )
    beside = [] if da is None else [summed_up(da, is_long_first=True)]
    douts = (unit.dgate, unit.dup)
    dx, inner, sums = lora.input_cotangent(
        gate_up, douts, lora.NarrowParts([dxa], db), beside=beside
    )
    dgate_up = lora.gradients(
        gate_up, douts, lora.down_gradients(x, gate_up, inner.dxa), inner.db
    )
    da = lora.down_gradient(down, *sums[0]) if sums else None
    return dx, dgate_up, da, narrow.db


def _unit_operands(
    gate_up: Projections,
    xa: jax.Array,
    dxa: list[Part],
    dtype: jax.typing.DTypeLike,
) -> tuple[Work, Work]:
    """Returns the works that make `ups` and `narrow` of `unit_cotangents`."""
    ups = [
        Part(source=up_rows(p), is_long_first=False, scale=p.scale_line, column=start)
        for p, start in zip(gate_up, starts_of(gate_up), strict=True)
        if p.has_adapter
    ]
    own = Part(source=xa, is_long_first=True)
    behind = [dataclasses.replace(part, column=xa.shape[1]) for part in dxa]
    joined = functools.partial(narrow_work, is_long_first=False, dtype=dtype)
    width = xa.shape[1] + sum(len(part.own_columns) for part in dxa)
    return (
        joined(ups, length=gate_up[0].weight.shape[1], width=xa.shape[1]),
        joined([own, *behind], length=xa.shape[0], width=width),
    )


_mlp.defvjp(_forward, _backward)
