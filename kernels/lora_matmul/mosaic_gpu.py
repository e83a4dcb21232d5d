"""The forward and the backward pass on Hopper, with kernels for every large product.

Weights are dequantised once a pass to a scratch matrix, bit-equal with bitsandbytes,
and multiplied from there (docs/decisions/0007). Of a group, `x` is read once for all
adapters, and the low-rank products are summed in the accumulators of the large ones.
A bias joins them: ones times its values, in as many 16-bit parts as make it exact.
Few rows, as in decoding, have a forward pass of their own, and XLA's backward pass.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.device import multiprocessors, require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.nf4 import NF4Array
from kernels.packed import dense
from kernels.persistent_product import tiles_for

from . import xla
from .accumulate import Term, accumulated_products
from .few_rows import MAX_ROWS, check_few_rows, few_rows_product
from .products import product
from .projection import Projection
from .skinny import (
    MAX_COTANGENT_RANK,
    MAX_RANK,
    low_rank_cotangents,
    low_rank_gradient,
    low_rank_product,
)
from .xla import RESIDUAL_NAMES, Added, Keys, Projections

_PAD = 8  # columns: 16 bytes, the least that the copy engine moves
_TILE = 64  # columns: what it moves at a time, or less in all
_DTYPES = ("bfloat16", "float16")


class Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      x: (M, I).
      projections: As given, weights packed.
      xa: `scaling * x @ a` of all adapters side by side, each filled up with zeros to a
        multiple of eight columns; None without adapters.
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
    if sum(_widths(projections)) > MAX_RANK:
        raise UnsupportedOp(f"the ranks of the group exceed {MAX_RANK}")
    tiles_for(x.shape[0], [p.weight.shape[1] for p in projections])
    tiles_for(x.shape[0], [x.shape[1]])


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


def scaled_down(
    projections: Projections, dtype: jax.typing.DTypeLike
) -> jax.Array | None:
    """Returns `(scaling * a)^T` of all adapters, one under the other; None of none."""
    if not any(_widths(projections)):
        return None
    downs = [_down(p) * p.scale for p in projections if p.has_adapter]
    return jnp.concatenate(downs).astype(dtype)


def many_rows_forward(
    x: jax.Array,
    projections: Projections,
    added: Added,
    xa: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], Residuals]:
    """Does as `forward` with more than `MAX_ROWS` rows.

    `xa`, where it is there already, is the product of `x` with `scaled_down`.
    """
    down = scaled_down(projections, x.dtype)
    if down is not None:
        if xa is None:
            xa = low_rank_product(x, down, blocks=multiprocessors())
        xa = checkpoint_name(_used_twice(xa), RESIDUAL_NAMES[0])
    narrow = _with_ones(xa, x, projections)
    sums = []
    for index, projection in enumerate(projections):
        terms = [(x, _stored(projection, x.dtype))]
        if narrow is not None:
            up = _narrow_weight(projections, index, x.dtype)
            terms.append((_filled(narrow, axis=1), up))
        sums.append(terms)
    tiles = tiles_for(x.shape[0], [p.weight.shape[1] for p in projections])
    outputs = accumulated_products(
        sums,
        is_transposed=is_packed(projections[0]),
        tiles=tiles,
        blocks=multiprocessors(),
        added=added if tiles.has_parts else (),
    )
    if not tiles.has_parts:
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
    terms, narrow = input_terms(projections, xa, douts)
    (dx,) = accumulated_products(
        [terms],
        is_transposed=not is_packed(projections[0]),
        tiles=tiles_for(x.shape[0], [x.shape[1]]),
        blocks=multiprocessors(),
    )
    return dx, gradients(x, projections, douts, narrow)


class NarrowCotangents(NamedTuple):
    """What the adapters need of the cotangents of the outputs.

    Attributes:
      dxa: Of `x @ a` of all adapters side by side; None without adapters.
      db: Of each `b`.
    """

    dxa: jax.Array | None
    db: list[jax.Array | None]


def input_terms(
    projections: Projections, xa: jax.Array | None, douts: tuple[jax.Array, ...]
) -> tuple[list[Term], NarrowCotangents]:
    """Returns what is summed up for the cotangent of the input."""
    dtype = douts[0].dtype
    terms = [
        (dout, _stored(p, dtype)) for dout, p in zip(douts, projections, strict=True)
    ]
    if xa is None:
        return terms, NarrowCotangents(None, [None] * len(projections))
    dxa, db = _narrow_cotangents(douts, xa, projections)
    down = jnp.concatenate([_down(p) for p in projections if p.has_adapter])
    down = _filled(down.astype(dtype), axis=0)
    down = down if is_packed(projections[0]) else down.T
    terms.append((_filled(dxa, axis=1), down))
    return terms, NarrowCotangents(dxa, db)


def gradients(
    x: jax.Array,
    projections: Projections,
    douts: tuple[jax.Array, ...],
    narrow: NarrowCotangents,
) -> Projections:
    """Returns the cotangents of all that is trained."""
    da: list[jax.Array | None] = [None] * len(projections)
    if narrow.dxa is not None:
        da = _down_gradients(x, narrow.dxa, projections)
    return tuple(
        dataclasses.replace(
            projection,
            weight=None,
            bias=_sum_rows(dout, projection.bias),
            lora_a=da[i],
            lora_b=narrow.db[i],
            scaling=None,
        )
        for i, (projection, dout) in enumerate(zip(projections, douts, strict=True))
    )


def _used_twice(results: Any) -> Any:
    """Keeps XLA from running a kernel twice whose results a scan uses and saves.

    Once for each: the second writes straight into the stack of all layers.
    """
    return jax.lax.optimization_barrier(results)


def _narrow_cotangents(
    douts: tuple[jax.Array, ...], xa: jax.Array, projections: Projections
) -> tuple[jax.Array, list[jax.Array | None]]:
    """Returns `scaling * dout @ b^T` of all adapters side by side, and each one's db.

    db is `(scaling * x @ a)^T @ dout`, in the dtype of `b`.
    """
    parts = []
    db: list[jax.Array | None] = []
    starts, widths = _starts(projections), _widths(projections)
    for dout, p, start, width in zip(douts, projections, starts, widths, strict=True):
        if p.lora_b is None:
            db.append(None)
            continue
        up = _padded(p.lora_b.astype(jnp.float32) * p.scale).astype(dout.dtype)
        part, gradient = _both_products(dout, up, xa[:, start : start + width])
        parts.append(part)
        db.append(gradient.T[: p.lora_b.shape[0]].astype(p.lora_b.dtype))
    return jnp.concatenate(parts, axis=1), db


def _both_products(
    dout: jax.Array, up: jax.Array, xa: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `dout @ up^T` and `dout^T @ xa`, reading `dout` once if it can."""
    blocks = multiprocessors()
    if up.shape[0] <= MAX_COTANGENT_RANK:
        return low_rank_cotangents(dout, up, xa, blocks=blocks)
    product = low_rank_product(dout, up, blocks=blocks)
    return product, low_rank_gradient(dout, xa, blocks=blocks)


def _down_gradients(
    x: jax.Array, dxa: jax.Array, projections: Projections
) -> list[jax.Array | None]:
    """Returns `x^T @ dxa` of each adapter, in the dtype of its `a`."""
    joined = low_rank_gradient(x, dxa, blocks=multiprocessors())
    gradients: list[jax.Array | None] = []
    for projection, start in zip(projections, _starts(projections), strict=True):
        a = projection.lora_a
        gradients.append(
            None if a is None else joined[:, start : start + a.shape[1]].astype(a.dtype)
        )
    return gradients


def _stored(projection: Projection, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the weight as it lies in memory: (O, I) of a packed one, else (I, O)."""
    weight = dense(projection.weight, dtype)
    return weight.T if is_packed(projection) else weight


def _narrow_weight(
    projections: Projections, index: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns what the narrow columns are multiplied with for one projection.

    Rows that stand for the other projections' adapters are zero.
    """
    projection, widths = projections[index], _widths(projections)
    outputs = projection.weight.shape[1]
    up = jnp.zeros((0, outputs), dtype)
    if projection.lora_b is not None:
        up = _padded(projection.lora_b.astype(dtype))
    before, after = sum(widths[:index]), sum(widths[index + 1 :])
    rows = [jnp.pad(up, ((before, after), (0, 0)))]
    if any(p.bias is not None for p in projections):
        rows.append(_bias_rows(projection.bias, outputs, dtype))
    joined = _filled(jnp.concatenate(rows), axis=0)
    return joined.T if is_packed(projection) else joined


def _filled(narrow: jax.Array, *, axis: int) -> jax.Array:
    """Fills up with zeros to a width that the copy engine takes in tiles of 64."""
    size = narrow.shape[axis]
    missing = 0 if size <= _TILE else -size % _TILE
    return jnp.pad(narrow, [(0, missing if i == axis else 0) for i in range(2)])


def _with_ones(
    xa: jax.Array | None, x: jax.Array, projections: Projections
) -> jax.Array | None:
    """Returns `xa` with columns of ones beside it if a projection has a bias."""
    if all(p.bias is None for p in projections):
        return xa
    ones = jnp.ones((x.shape[0], _PAD), x.dtype)
    return ones if xa is None else jnp.concatenate([xa, ones], axis=1)


def _bias_rows(
    bias: jax.Array | None, outputs: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns rows whose sum is the bias: three 16-bit parts of a float32 number."""
    if bias is None:
        return jnp.zeros((_PAD, outputs), dtype)
    info = jnp.finfo(dtype)
    rest, parts = bias.astype(jnp.float32), []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(rest, int(info.nexp), int(info.nmant)))
        rest = rest - parts[-1]
    return _padded(jnp.stack(parts)).astype(dtype)


def _down(projection: Projection) -> jax.Array:
    """Returns `a^T` in float32, its rows filled up."""
    assert projection.lora_a is not None
    return _padded(projection.lora_a.astype(jnp.float32).T)


def _padded(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % _PAD), (0, 0)))


def _widths(projections: Projections) -> list[int]:
    """Returns how many of the narrow columns each adapter has."""
    ranks = [0 if p.lora_a is None else p.lora_a.shape[1] for p in projections]
    return [-(-rank // _PAD) * _PAD for rank in ranks]


def _starts(projections: Projections) -> list[int]:
    return list(itertools.accumulate(_widths(projections), initial=0))[:-1]


def _sum_rows(dout: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    if bias is None:
        return None
    return jnp.sum(dout.astype(jnp.float32), axis=0).astype(bias.dtype)


def is_packed(projection: Projection) -> bool:
    """Whether the weight lies in memory as (O, I)."""
    return isinstance(projection.weight, NF4Array)
