"""Operands of the large products: weights as they lie in memory, and adapters' ones.

The narrow columns of a group are those of all its adapters side by side, each filled up
with zeros to a multiple of eight. What they are multiplied with is cast and laid out by
blocks of the launch that dequantises the weights, which add up cotangents as well.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.joint_launch import Work, joint_launch
from kernels.nf4 import NF4Array, dequantize_group
from kernels.packed import dense

from .narrow import Part, narrow_work
from .projection import Projection
from .xla import Projections

NARROW_NAME = "narrow_operands"

_PAD = 8  # columns: 16 bytes, the least that the copy engine moves
_TILE = 64  # columns: what it moves at a time, or less in all


def stored_weights(
    projections: Projections,
    dtype: jax.typing.DTypeLike,
    beside: Sequence[Work] = (),
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """Returns the weights as they lie in memory, and the results of what runs beside.

    (O, I) of a packed one, else (I, O). All of it is one launch.
    """
    weights = [p.weight for p in projections]
    packed = [weight for weight in weights if isinstance(weight, NF4Array)]
    if packed:
        matrices, results = dequantize_group(packed, dtype=dtype, beside=beside)
        return [matrix.T for matrix in matrices], results
    results = joint_launch(tuple(beside), name=NARROW_NAME) if beside else []
    return [dense(weight, dtype) for weight in weights], results


def scaled_down(
    projections: Projections, dtype: jax.typing.DTypeLike
) -> jax.Array | None:
    """Returns `(scaling * a)^T` of all adapters, one under the other; None of none.

    Not beside the weights: where the backward pass makes `x @ a` again, it need not
    make them as well.
    """
    if not any(widths_of(projections)):
        return None
    work = joined_downs(projections, dtype, is_scaled=True)
    ((down,),) = joint_launch((work,), name=NARROW_NAME)
    return down


def joined_downs(
    projections: Projections,
    dtype: jax.typing.DTypeLike,
    *,
    is_scaled: bool = False,
    is_long_first: bool = False,
) -> Work:
    """Returns the work that joins `a` of all adapters, as rows or as columns."""
    parts = [
        Part(
            source=_columns(p),
            is_long_first=True,
            scale=p.scale_line if is_scaled else None,
            column=start,
        )
        for p, start in zip(projections, starts_of(projections), strict=True)
        if p.has_adapter
    ]
    return narrow_work(
        parts,
        length=projections[0].weight.shape[0],
        width=_filled_width(sum(widths_of(projections))),
        is_long_first=is_long_first,
        dtype=dtype,
    )


def joined_parts(
    parts: Sequence[Part], projections: Projections, dtype: jax.typing.DTypeLike
) -> Work:
    """Returns the work that adds up the cotangents of `x @ a` of all adapters."""
    return narrow_work(
        parts,
        length=parts[0].length,
        width=_filled_width(sum(widths_of(projections))),
        is_long_first=True,
        dtype=dtype,
    )


def summed_up(part: Part, *, is_long_first: bool = False) -> Work:
    """Returns the work that adds up a part alone, in float32, as rows or columns."""
    return narrow_work(
        [part],
        length=part.length,
        width=len(part.own_columns),
        is_long_first=is_long_first,
        dtype=jnp.float32,
    )


def joined_ups(
    projections: Projections, width: int, dtype: jax.typing.DTypeLike
) -> Work:
    """Returns the work that makes what the narrow columns are multiplied with.

    Of every output, the rows that stand for other projections' adapters are zero.
    """
    parts, first = [], 0
    after_adapters = _filled_width(sum(widths_of(projections)))
    for projection, start in zip(projections, starts_of(projections), strict=True):
        if projection.lora_b is not None:
            own = {"source": up_rows(projection), "first": first, "column": start}
            parts.append(Part(is_long_first=False, **own))
        if projection.bias is not None:
            rows = _bias_rows(projection.bias, dtype)
            own = {"source": rows, "first": first, "column": after_adapters}
            parts.append(Part(is_long_first=False, **own))
        first += projection.weight.shape[1]
    return narrow_work(
        parts,
        length=first,
        width=width,
        is_long_first=is_packed(projections[0]),
        dtype=dtype,
    )


def filled_columns(narrow: jax.Array) -> jax.Array:
    """Fills up columns with zeros to a width that the copy engine takes."""
    missing = _filled_width(narrow.shape[1]) - narrow.shape[1]
    return jnp.pad(narrow, ((0, 0), (0, missing)))


def _filled_width(width: int) -> int:
    """Returns at least `width` columns that the copy engine moves in tiles of 64."""
    return width if width <= _TILE else width + -width % _TILE


def with_ones(
    xa: jax.Array | None, x: jax.Array, projections: Projections
) -> jax.Array | None:
    """Returns `xa` with columns of ones beside it if a projection has a bias."""
    if all(p.bias is None for p in projections):
        return xa
    ones = jnp.ones((x.shape[0], _PAD), x.dtype)
    return ones if xa is None else filled_columns(jnp.concatenate([xa, ones], axis=1))


def _bias_rows(bias: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns rows whose sum is the bias: three 16-bit parts of a float32 number."""
    info = jnp.finfo(dtype)
    rest, parts = bias.astype(jnp.float32), []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(rest, int(info.nexp), int(info.nmant)))
        rest = rest - parts[-1]
    return _padded(jnp.stack(parts))


def _columns(projection: Projection) -> jax.Array:
    """Returns `a` in float32, its columns filled up."""
    assert projection.lora_a is not None
    missing = -projection.lora_a.shape[1] % _PAD
    return jnp.pad(projection.lora_a.astype(jnp.float32), ((0, 0), (0, missing)))


def up_rows(projection: Projection) -> jax.Array:
    """Returns `b` in float32, its rows filled up."""
    assert projection.lora_b is not None
    return _padded(projection.lora_b.astype(jnp.float32))


def _padded(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % _PAD), (0, 0)))


def widths_of(projections: Projections) -> list[int]:
    """Returns how many of the narrow columns each adapter has."""
    ranks = [0 if p.lora_a is None else p.lora_a.shape[1] for p in projections]
    return [-(-rank // _PAD) * _PAD for rank in ranks]


def starts_of(projections: Projections) -> list[int]:
    """Returns where the columns of each adapter begin."""
    return list(itertools.accumulate(widths_of(projections), initial=0))[:-1]


def is_packed(projection: Projection) -> bool:
    """Whether the weight lies in memory as (O, I)."""
    return isinstance(projection.weight, NF4Array)
