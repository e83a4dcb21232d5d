"""The forward and the backward pass on Hopper, with kernels for every large product.

Weights are dequantised once a pass to a scratch matrix, bit-equal with bitsandbytes,
and multiplied from there (docs/decisions/0007). Of a group, `x` is read once for all
adapters, and the low-rank products are summed in the accumulators of the large ones.
A bias joins them: ones times its values, in as many 16-bit parts as make it exact.
Few rows, as in decoding, have a forward pass of their own, and XLA's backward pass.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.device import multiprocessors, require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.joint_launch import Work
from kernels.persistent_product import has_parts, tile_n_for

from . import xla
from .accumulate import Term, accumulated_products
from .few_rows import MAX_ROWS, check_few_rows, few_rows_product
from .low_rank_cotangents import (
    MAX_COTANGENT_RANK,
    MAX_GROUPED_RANK,
    low_rank_cotangents,
)
from .narrow import Part
from .operands import (
    is_packed,
    joined_downs,
    joined_parts,
    joined_ups,
    scaled_down,
    starts_of,
    stored_weights,
    summed_up,
    up_rows,
    widths_of,
    with_ones,
)
from .products import product
from .projection import Projection
from .skinny import MAX_RANK, low_rank_gradient, low_rank_product
from .xla import RESIDUAL_NAMES, Added, Keys, Projections

_DTYPES = ("bfloat16", "float16")


class Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      x: (M, I).
      projections: As given, weights packed.
      xa: `scaling * x @ a` of all adapters side by side, each filled up with zeros to a
        multiple of eight columns, and all to one of 64 if they are more; None without
        adapters.
    """

    x: jax.Array
    projections: Projections
    xa: jax.Array | None


def check(
    dropout_rate: float,
    x: jax.Array | jax.ShapeDtypeStruct,
    projections: Projections,
    keys: Keys,
) -> None:
    """Raises `UnsupportedOp` for what the kernels lack."""
    del dropout_rate  # without keys nothing is dropped
    require_hopper()
    if x.dtype.name not in _DTYPES:
        raise UnsupportedOp(f"{x.dtype=} must be one of {', '.join(_DTYPES)}")
    if any(key is not None for key in keys):
        raise UnsupportedOp("the kernels have no dropout")
    if any(p.magnitude is not None for p in projections):
        raise UnsupportedOp("the kernels have no DoRA")
    if x.shape[0] <= MAX_ROWS:
        for projection in projections:
            check_few_rows(x, projection.weight)
        return
    if len({is_packed(p) for p in projections}) > 1:
        raise UnsupportedOp("some weights of the group are packed, others are not")
    if sum(widths_of(projections)) > MAX_RANK:
        raise UnsupportedOp(f"the ranks of the group exceed {MAX_RANK}")
    tile_n_for(x.shape[0], [p.weight.shape[1] for p in projections])
    tile_n_for(x.shape[0], [x.shape[1]])


def forward(
    dropout_rate: float,
    x: jax.Array,
    projections: Projections,
    keys: Keys,
    added: Added,
) -> tuple[tuple[jax.Array, ...], Residuals | xla.Residuals]:
    """Returns the product of each projection, and what its gradient needs."""
    if x.shape[0] <= MAX_ROWS:
        return _few_rows_forward(dropout_rate, x, projections, keys, added)
    return many_rows_forward(x, projections, added)


def many_rows_forward(
    x: jax.Array,
    projections: Projections,
    added: Added,
    xa: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], Residuals]:
    """Does as `forward` with more than `MAX_ROWS` rows.

    `xa`, where it is there already, is the product of `x` with `scaled_down`.
    """
    shared, beside = None, []
    if xa is None:
        down = scaled_down(projections, x.dtype)
        if down is not None:
            xa = low_rank_product(x, down, blocks=multiprocessors())
    if xa is not None:
        xa = checkpoint_name(_used_twice(xa), RESIDUAL_NAMES[0])
    narrow = with_ones(xa, x, projections)
    if narrow is not None:
        beside.append(joined_ups(projections, narrow.shape[1], x.dtype))
    weights, made = stored_weights(projections, x.dtype, beside)
    if narrow is not None:
        shared = narrow, made[0][0]
    tile_n = tile_n_for(x.shape[0], [p.weight.shape[1] for p in projections])
    outputs = accumulated_products(
        [[(x, weight)] for weight in weights],
        is_transposed=is_packed(projections[0]),
        tile_n=tile_n,
        blocks=multiprocessors(),
        shared=shared,
        added=added if has_parts(tile_n) else (),
    )
    if not has_parts(tile_n):
        outputs[: len(added)] = map(jnp.add, outputs, added)
    return tuple(_used_twice(outputs)), Residuals(x, projections, xa)


def _few_rows_forward(
    dropout_rate: float,
    x: jax.Array,
    projections: Projections,
    keys: Keys,
    added: Added,
) -> tuple[tuple[jax.Array, ...], xla.Residuals]:
    """Does as `forward`, reading every weight once, as codes."""
    xa = xla.scaled_down_products(dropout_rate, x, projections, keys)
    outputs = []
    for projection, own in zip(projections, xa, strict=True):
        y = few_rows_product(x, projection.weight, blocks=multiprocessors())
        if own is not None:
            y = y + product(own, xla.up(projection, x.dtype), jnp.float32)
        outputs.append(xla.epilogue(y, projection, None, x.dtype))
    outputs[: len(added)] = map(jnp.add, outputs, added)
    norms = (None,) * len(projections)
    return tuple(outputs), xla.Residuals(x, projections, keys, xa, norms)


def backward(
    dropout_rate: float,
    residuals: Residuals | xla.Residuals,
    douts: tuple[jax.Array, ...],
) -> tuple[jax.Array, Projections]:
    """Returns the cotangents of `x` and of all that is trained."""
    if isinstance(residuals, xla.Residuals):
        return xla.backward(dropout_rate, residuals, douts)
    x, projections, xa = residuals
    parts = narrow_parts(projections, xa, douts)
    dx, narrow, _ = input_cotangent(projections, douts, parts)
    da = down_gradients(x, projections, narrow.dxa)
    return dx, gradients(projections, douts, da, narrow.db)


class NarrowParts(NamedTuple):
    """What the adapters need of the cotangents of the outputs, still to be added up.

    Attributes:
      dxa: Of `x @ a` of all adapters, where they are side by side; empty without any.
      db: Of each `b`, transposed.
    """

    dxa: list[Part]
    db: list[Part | None]


class NarrowCotangents(NamedTuple):
    """What the adapters need of the cotangents of the outputs.

    Attributes:
      dxa: Of `x @ a` of all adapters, side by side as there; None without adapters.
      db: Of each `b`.
    """

    dxa: jax.Array | None
    db: list[jax.Array | None]


def input_cotangent(
    projections: Projections,
    douts: tuple[jax.Array, ...],
    parts: NarrowParts,
    beside: Sequence[Work] = (),
) -> tuple[jax.Array, NarrowCotangents, list[list[jax.Array]]]:
    """Returns the cotangent of the input, the narrow ones, and results from beside.

    The launch that dequantises the weights adds up the parts and does what is beside.
    """
    dtype, is_long_first = douts[0].dtype, not is_packed(projections[0])
    own = []
    if parts.dxa:
        own.append(joined_downs(projections, dtype, is_long_first=is_long_first))
        own.append(joined_parts(parts.dxa, projections, dtype))
        own += [summed_up(part) for part in parts.db if part is not None]
    weights, made = stored_weights(projections, dtype, (*own, *beside))
    terms: list[Term] = [*zip(douts, weights, strict=True)]
    dxa, sums = None, iter(())
    if parts.dxa:
        ((down,), (dxa,), *sums), made = made[: len(own)], made[len(own) :]
        terms.append((dxa, down))
        sums = iter(sums)
    db = [
        None if part is None else up_gradient(projection, *next(sums))
        for part, projection in zip(parts.db, projections, strict=True)
    ]
    (dx,) = accumulated_products(
        [terms],
        is_transposed=is_long_first,
        tile_n=tile_n_for(douts[0].shape[0], [projections[0].weight.shape[0]]),
        blocks=multiprocessors(),
    )
    return dx, NarrowCotangents(dxa, db), made


def gradients(
    projections: Projections,
    douts: tuple[jax.Array, ...],
    da: list[jax.Array | None],
    db: list[jax.Array | None],
) -> Projections:
    """Returns the cotangents of all that is trained; those of adapters are given."""
    return tuple(
        dataclasses.replace(
            projection,
            weight=None,
            bias=xla.bias_gradient(dout, projection.bias),
            lora_a=da[i],
            lora_b=db[i],
            scaling=None,
        )
        for i, (projection, dout) in enumerate(zip(projections, douts, strict=True))
    )


def _used_twice(results: Any) -> Any:
    """Keeps XLA from running a kernel twice whose results a scan uses and saves.

    Once for each: the second writes straight into the stack of all layers.
    """
    return jax.lax.optimization_barrier(results)


def narrow_parts(
    projections: Projections, xa: jax.Array | None, douts: tuple[jax.Array, ...]
) -> NarrowParts:
    """Returns `scaling * dout @ b^T` of all adapters, and `dout^T @ xa` of each."""
    if xa is None:
        return NarrowParts([], [None] * len(projections))
    starts, widths = starts_of(projections), widths_of(projections)
    adapted = [i for i, p in enumerate(projections) if p.has_adapter]
    ups = [up_rows(projections[i]) for i in adapted]
    scales = [projections[i].scale_line for i in adapted]
    products = _both_products(
        [douts[i] for i in adapted], ups, scales, xa, tuple(starts[i] for i in adapted)
    )
    dxa: list[Part] = []
    db: list[Part | None] = [None] * len(projections)
    for i, down, gradient in zip(adapted, *products, strict=True):
        own = {"is_long_first": True, "columns": range(widths[i])}
        dxa.append(Part(source=down, column=starts[i], **own))
        db[i] = Part(source=gradient, **own)
    return NarrowParts(dxa, db)


def up_gradient(projection: Projection, gradient: jax.Array) -> jax.Array | None:
    """Returns the cotangent of `b`, given filled up in float32."""
    b = projection.lora_b
    return None if b is None else gradient[: b.shape[0]].astype(b.dtype)


def down_gradient(projection: Projection, gradient: jax.Array) -> jax.Array | None:
    """Returns the cotangent of `a`, given filled up in float32."""
    a = projection.lora_a
    return None if a is None else gradient[:, : a.shape[1]].astype(a.dtype)


def _both_products(
    douts: list[jax.Array],
    ups: list[jax.Array],
    scales: list[jax.Array],
    xa: jax.Array,
    starts: tuple[int, ...],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns `dout @ (scale * up)^T` and `dout^T @ xa`, reading `dout` once if it can.

    Of each, perhaps in parts; columns that the others have more of come after its own.
    """
    blocks, rank = multiprocessors(), max(up.shape[0] for up in ups)
    if rank <= MAX_GROUPED_RANK:
        ups = [jnp.pad(up, ((0, rank - up.shape[0]), (0, 0))) for up in ups]
        return low_rank_cotangents(douts, ups, scales, xa, starts=starts, blocks=blocks)
    products, gradients = [], []
    for dout, up, scale, start in zip(douts, ups, scales, starts, strict=True):
        if up.shape[0] <= MAX_COTANGENT_RANK:
            (part,), (gradient,) = low_rank_cotangents(
                (dout,), (up,), (scale,), xa, starts=(start,), blocks=blocks
            )
        else:
            rounded = (up * scale[0]).astype(dout.dtype)
            part = low_rank_product(dout, rounded, blocks=blocks)
            own = xa[:, start : start + up.shape[0]]
            gradient = low_rank_gradient(dout, own, blocks=blocks)
        products.append(part)
        gradients.append(gradient)
    return products, gradients


def down_gradients(
    x: jax.Array, projections: Projections, dxa: jax.Array | None
) -> list[jax.Array | None]:
    """Returns `x^T @ dxa` of each adapter, in the dtype of its `a`."""
    if dxa is None:
        return [None] * len(projections)
    joined = low_rank_gradient(x, dxa, blocks=multiprocessors())
    return [
        down_gradient(projection, joined[:, start:])
        for projection, start in zip(projections, starts_of(projections), strict=True)
    ]
