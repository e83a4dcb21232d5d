"""The adapters' side of the large products' operands, cast and laid out in one launch.

A narrow matrix is made of the float32 matrices of several adapters: the joined downs,
or the ups of a group, each where its output and its adapter are. What no part covers is
zero. A block writes 128 places along the long axis, a thread each.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.joint_launch import Work

_LENGTH = 128  # places of a block
_WIDTH = 16  # columns of a part that a block copies
_FLOATS = 4  # 16 bytes of a part
_VALUES = 8  # 16 bytes of the result


@dataclass(frozen=True, kw_only=True)
class Part:
    """A matrix within a narrow one.

    Attributes:
      source: (long, narrow) or (narrow, long) in float32; the narrow size is a multiple
        of eight, the long one of 128.
      is_long_first: Whether it is the former.
      scale: It is multiplied with, before it is rounded; None changes nothing.
      first: Where it begins along the long axis.
      column: Where it begins along the narrow axis.
    """

    source: jax.Array
    is_long_first: bool
    scale: jax.Array | None = None
    first: int = 0
    column: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Its extent along the long and along the narrow axis."""
        long, narrow = self.source.shape[:: 1 if self.is_long_first else -1]
        return long, narrow


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
      dtype: Of 16 bits.
    """
    operands: list[jax.Array] = []
    pieces: list[_Piece] = []
    for part in parts:
        long, narrow = part.size
        for start in range(0, narrow, _WIDTH):
            pieces.append(
                _Piece(
                    first=part.first // _LENGTH,
                    blocks=long // _LENGTH,
                    column=part.column + start,
                    columns=min(_WIDTH, narrow - start),
                    source=len(operands),
                    start=start,
                    is_long_first=part.is_long_first,
                    is_scaled=part.scale is not None,
                )
            )
        operands.append(part.source)
        if part.scale is not None:
            operands.append(part.scale.reshape(1))
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
      source: Place among the operands; its scale is the next one. None writes zeros.
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

            @pl.when((block >= begin) & (block < end))
            def _(piece=piece, begin=begin):
                values = self._values(piece, block - begin, operands, out_gmem.dtype)
                place = pl.ds((block - begin + piece.first) * _LENGTH, _LENGTH)
                narrow = pl.ds(piece.column, piece.columns)
                if self.is_long_first:
                    out_gmem[place, narrow] = values
                else:
                    out_gmem.at[narrow, place].T[...] = values

            begin = end

    def _values(self, piece: _Piece, block, operands, dtype):
        """Returns 128 rows of a piece, each in the registers of a thread."""
        layout = _row_a_thread(_VALUES if self.is_long_first else 1)
        if piece.source is None:
            return plgpu.layout_cast(jnp.zeros((_LENGTH, piece.columns), dtype), layout)
        source = operands[piece.source]
        place = pl.ds(block * _LENGTH, _LENGTH)
        narrow = pl.ds(piece.start, piece.columns)
        if piece.is_long_first:
            ref, vector = source.at[place, narrow], _FLOATS
        else:
            ref, vector = source.at[narrow, place].T, 1
        values = plgpu.load(ref, layout=_row_a_thread(vector), optimized=False)
        if piece.is_scaled:
            values = values * operands[piece.source + 1][0]
        return plgpu.layout_cast(values.astype(dtype), layout)


def _row_a_thread(vector: int):
    """Returns the layout of a row a thread, so many neighbours in a register."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(vector)
