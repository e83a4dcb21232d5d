"""Narrow matrices of several adapters, added up, cast and laid out in one launch.

One is made of matrices that lie elsewhere: the joined downs, the ups of a group, each
where its output and its adapter are, or what kernels have left to be added up. What no
part covers is zero. A block writes 128 places along the long axis, a thread each.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.joint_launch import Work, run_between

_LENGTH = 128  # places of a block
_WIDTH = 16  # columns of a part that a block copies
_BYTES = 16  # that a thread reads or writes at a time, where it can
_TERMS = 2  # of a sum that a block reads at a time


@dataclass(frozen=True, kw_only=True)
class Part:
    """A matrix within a narrow one.

    Attributes:
      source: (long, narrow) or (narrow, long); the narrow size is a multiple of eight,
        the long one of 128. A stack of such matrices is added up, in float32.
      is_long_first: Whether it is the former.
      columns: Those along its narrow axis that are taken; None takes all.
      scale: A line of what it is multiplied with, before it is rounded; None changes
        nothing.
      first: Where it begins along the long axis.
      column: Where it begins along the narrow axis.
    """

    source: jax.Array
    is_long_first: bool
    columns: range | None = None
    scale: jax.Array | None = None
    first: int = 0
    column: int = 0

    @property
    def length(self) -> int:
        """Its extent along the long axis."""
        return self.source.shape[-2 if self.is_long_first else -1]

    @property
    def own_columns(self) -> range:
        """What it takes along the narrow axis."""
        narrow = self.source.shape[-1 if self.is_long_first else -2]
        return range(narrow) if self.columns is None else self.columns


def narrow_work(
    parts: Sequence[Part],
    *,
    length: int,
    width: int,
    is_long_first: bool,
    dtype: jax.typing.DTypeLike,
) -> Work:
    """Returns the work that joins `parts` to a (length, width) matrix.

    Args:
      parts: No two overlap.
      length: A multiple of 128.
      width: A multiple of eight.
      is_long_first: If not, the result is (width, length).
      dtype: Of the result.
    """
    operands: list[jax.Array] = []
    pieces: list[_Piece] = []
    for part in parts:
        columns = part.own_columns
        for start in columns[::_WIDTH]:
            pieces.append(
                _Piece(
                    first=part.first // _LENGTH,
                    blocks=part.length // _LENGTH,
                    column=part.column + start - columns.start,
                    columns=min(_WIDTH, columns.stop - start),
                    source=len(operands),
                    start=start,
                    is_long_first=part.is_long_first,
                    is_scaled=part.scale is not None,
                )
            )
        operands.append(part.source)
        if part.scale is not None:
            operands.append(part.scale)
        if part.source.ndim == 3:
            operands.append(_batches(part.source.shape[0]))
    pieces += _gaps(pieces, length // _LENGTH, width)
    return Work(
        operands=tuple(operands),
        results=(
            jax.ShapeDtypeStruct(
                (length, width) if is_long_first else (width, length), dtype
            ),
        ),
        blocks=sum(piece.blocks for piece in pieces),
        run=_Join(pieces=tuple(pieces), is_long_first=is_long_first),
    )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Columns of the result that some blocks write.

    Attributes:
      first: Block along the long axis where it begins.
      blocks: How many it takes.
      column: Where it begins along the narrow axis.
      columns: How many it has.
      source: Place among the operands; what is of it follows. None writes zeros.
      start: Where it begins along the narrow axis of the source.
      is_long_first: Whether the source has the long axis first.
      is_scaled: Whether there is a scale.
    """

    first: int
    blocks: int
    column: int
    columns: int
    source: int | None = None
    start: int = 0
    is_long_first: bool = False
    is_scaled: bool = False


def _gaps(pieces: Sequence[_Piece], blocks: int, width: int) -> Iterator[_Piece]:
    """Yields what no piece covers."""
    ends = {end for p in pieces for end in (p.first, p.first + p.blocks)}
    for first, end in itertools.pairwise(sorted({0, blocks, *ends})):
        column = 0
        here = [p for p in pieces if p.first <= first and end <= p.first + p.blocks]
        for piece in [*sorted(here, key=lambda piece: piece.column), None]:
            border = width if piece is None else piece.column
            if column < border:
                yield _Piece(
                    first=first,
                    blocks=end - first,
                    column=column,
                    columns=border - column,
                )
            column = width if piece is None else piece.column + piece.columns


@dataclass(frozen=True, kw_only=True)
class _Join:
    """A block that writes 128 places along the long axis of a piece."""

    pieces: tuple[_Piece, ...]
    is_long_first: bool

    def __call__(self, block, *refs) -> None:
        *operands, out_gmem = refs
        begin = 0
        for piece in self.pieces:
            end = begin + piece.blocks

            @functools.partial(run_between, block, begin, end)
            def _(index, piece=piece):
                values = self._values(piece, index, operands, out_gmem.dtype)
                place = pl.ds((index + piece.first) * _LENGTH, _LENGTH)
                narrow = pl.ds(piece.column, piece.columns)
                if self.is_long_first:
                    out_gmem[place, narrow] = values
                else:
                    out_gmem.at[narrow, place].T[...] = values

            begin = end

    def _values(self, piece: _Piece, block, operands, dtype):
        """Returns 128 rows of a piece, each in the registers of a thread."""
        layout = _row_a_thread(dtype if self.is_long_first else None)
        if piece.source is None:
            return plgpu.layout_cast(jnp.zeros((_LENGTH, piece.columns), dtype), layout)
        source = operands[piece.source]
        place = pl.ds(block * _LENGTH, _LENGTH)
        narrow = pl.ds(piece.start, piece.columns)

        def term(*index):
            if piece.is_long_first:
                ref, together = source.at[*index, place, narrow], source.dtype
            else:
                ref, together = source.at[*index, narrow, place].T, None
            return plgpu.load(ref, layout=_row_a_thread(together), optimized=False)

        beside = iter(operands[piece.source + 1 :])
        scale = next(beside)[0] if piece.is_scaled else None
        if len(source.shape) == 3:
            values = _sum_of(term, source.shape[0], next(beside)[0])
        else:
            values = term()
        if scale is not None:
            values = values * scale
        return plgpu.layout_cast(values.astype(dtype), layout)


def _batches(terms: int) -> jax.Array:
    """Returns how many batches of a sum follow the first one.

    An operand: compilers that know the number take all batches into registers at once,
    and fewer blocks dequantise.
    """
    return jnp.asarray([(terms - 1) // _TERMS], jnp.int32)


def _sum_of(term: Callable[[Any], Any], count: int, batches: Any) -> Any:
    """Returns the sum of so many terms, always in the same order."""

    def some(first: Any, terms: int) -> Any:
        return functools.reduce(operator.add, [term(first + i) for i in range(terms)])

    head = (count - 1) % _TERMS + 1

    def add(batch: Any, total: Any) -> Any:
        return total + some(head + batch * _TERMS, _TERMS)

    return lax.fori_loop(0, batches, add, some(0, head))


def _row_a_thread(dtype: jax.typing.DTypeLike | None):
    """Returns the layout of a row a thread, neighbours of a dtype in a register."""
    together = 1 if dtype is None else _BYTES // jnp.dtype(dtype).itemsize
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(together)
