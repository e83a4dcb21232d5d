"""Both narrow products of output cotangents on Hopper, in one reading of each.

A block goes down the rows of a slab of columns of one matrix. What is contracted along
the rows stays in registers, a half of the columns in each warpgroup; of what is
contracted along the columns each slab has a part. Where slabs alone do not fill the
device, the rows are split too. A later launch adds the parts, in float32.

Budget of a block: that of `kernels.streaming`, and up to 64 KiB for a slab of `up`; two
warpgroups multiply.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.streaming import LINE, ROWS, launch, num_parts, streamed
from kernels.wgmma import accumulator, swizzled

KERNEL_NAME = "low_rank_cotangents"

MAX_COTANGENT_RANK = LINE
MAX_GROUPED_RANK = 32
"""Above, several matrices in one launch have too few registers."""

_WORKERS = 2
_SLAB = 512  # columns of a block, at most


@functools.partial(jax.jit, static_argnames=("starts", "blocks"))
def low_rank_cotangents(
    douts: Sequence[Float[Array, "M _"]],
    ups: Sequence[Float32[Array, "R _"]],
    scales: Sequence[Float32[Array, " line"]],
    xa: Float[Array, "M W"],
    *,
    starts: tuple[int, ...],
    blocks: int,
) -> tuple[list[Float32[Array, "_ M R"]], list[Float32[Array, "_ _ R"]]]:
    """Returns `dout @ (scale * up)^T` and `dout^T @ xa` of each `dout`, in parts.

    They are to be added along the first axis. All of it is one launch. Compiled, so
    that equal calls in a program are lowered once.

    Args:
      douts: Of 16 bits.
      ups: Scaled ones are rounded to the dtype of `douts`.
      scales: A line of that of each of `ups`.
      xa: What each of `douts` is multiplied with, side by side.
      starts: Where in `xa` the R columns of each one begin.
      blocks: As many as the device has multiprocessors.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles, or the rank exceeds a line.
    """
    rows, rank, dtype = douts[0].shape[0], ups[0].shape[0], douts[0].dtype
    widths = [dout.shape[1] for dout in douts]
    slab = math.gcd(_SLAB, *widths)
    if rows % ROWS or slab % (_WORKERS * LINE) or rank % 8 or rank > MAX_COTANGENT_RANK:
        raise UnsupportedOp(f"{rows=}, {widths=} and {rank=} do not suit the tiles")
    ends = [0, *itertools.accumulate(width // slab for width in widths)]
    splits = num_parts(ends[-1], rows // ROWS, blocks)
    narrow = [_on_a_line(xa, start, rank) for start in starts]
    results = launch(
        KERNEL_NAME,
        functools.partial(
            _body,
            ends=ends,
            starts=[start for _, start in narrow],
            steps=rows // ROWS // splits,
        ),
        [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in (
                *((width // slab, rows, rank) for width in widths),
                *((splits, width, rank) for width in widths),
            )
        ],
        (ends[-1], splits),
        *douts,
        *ups,
        *scales,
        *(array for array, _ in narrow),
        multipliers=_WORKERS,
        scratch_types=[
            plgpu.SMEM((rank, slab), dtype, transforms=swizzled(LINE, dtype)),
            plgpu.Barrier(num_arrivals=_WORKERS),
        ],
    )
    return [*results[: len(douts)]], [*results[len(douts) :]]


def _on_a_line(xa: jax.Array, start: int, rank: int) -> tuple[jax.Array, int]:
    """Returns an array with these columns of `xa` within 64, and where they begin."""
    if start % LINE + rank <= LINE:
        return xa, start
    return xa[:, start : start + rank], 0


def _body(*refs: Any, ends: list[int], starts: list[int], steps: int) -> None:
    """Sends each block down its slab of the matrix that has it."""
    *matrices, up_smem, ready = refs
    index, part = lax.axis_index("row"), lax.axis_index("part")
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(part * steps * ROWS, steps * ROWS)
    for i, (first, end) in enumerate(itertools.pairwise(ends)):

        @pl.when((index >= first) & (index < end))
        def _(i=i, first=first):
            dout, up, scale, xa, dxa, db = matrices[i :: len(starts)]
            block = _Block(
                dout=dout,
                up=up,
                scale=scale,
                xa=xa,
                dxa=dxa,
                db=db,
                up_smem=up_smem,
                ready=ready,
                warpgroup=warpgroup,
                index=index - first,
                part=part,
                rows=rows,
                start=starts[i],
                steps=steps,
            )
            block.go_down()


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A block at its work, inside of the kernel.

    Attributes:
      dout: The matrix.
      up: What it is multiplied with, before it is scaled.
      scale: Of `up`.
      xa: What it is multiplied with, transposed, among other columns.
      dxa: The first products; a part for each slab.
      db: The second ones; one for each part of the rows.
      up_smem: The slab of `up`, scaled and rounded.
      ready: Where the warpgroups wait until both have written their half of it.
      warpgroup: Of the two that multiply, or the one that loads.
      index: Of the slab.
      part: Of the rows.
      rows: Those of the part.
      start: Where the columns in `xa` begin.
      steps: Tiles of rows.
    """

    dout: Any
    up: Any
    scale: Any
    xa: Any
    dxa: Any
    db: Any
    up_smem: Any
    ready: Any
    warpgroup: Any
    index: Any
    part: Any
    rows: Any
    start: int
    steps: int

    @property
    def _rank(self) -> int:
        return self.up_smem.shape[0]

    @property
    def _slab(self) -> int:
        """Columns of the block."""
        return self.up_smem.shape[1]

    @property
    def _column(self) -> Any:
        """Where the slab begins in `dout` and `up`."""
        return self.index * self._slab

    @property
    def _own(self) -> int:
        """Columns of a warpgroup."""
        return self._slab // _WORKERS

    @property
    def _first(self) -> Any:
        """Where this warpgroup's columns begin in the slab."""
        return self.warpgroup * self._own

    def go_down(self) -> None:
        """Multiplies all tiles of the slab and stores both products."""
        line, columns = self.start // LINE, pl.ds(self._column, self._slab)
        streamed(
            self._multiply,
            self._context,
            self.steps,
            ((ROWS, self._slab), lambda k: (k, 0)),
            ((ROWS, LINE), lambda k: (k, line)),  # beyond the end it reads zeros
            multipliers=_WORKERS,
        )(self.dout.at[self.rows, columns], self.xa.at[self.rows])

    def _context(self, run: Any) -> None:
        """Runs the loop over the tiles with `up` in its place; stores what is left."""
        self._place_up()

        @functools.partial(pl.run_scoped, acc=accumulator(self._own, LINE))
        def _(acc):
            run(acc)
            first = self._column + self._first
            offset = self.start % LINE
            own = acc[...][:, offset : offset + self._rank]
            self.db[self.part, pl.ds(first, self._own)] = own

    def _place_up(self) -> None:
        """Writes this warpgroup's columns of `up` to shared memory, rounded."""
        columns = range(0, self._own, LINE)
        # Loads pass no store: one by one, their latencies would add up.
        for batch in itertools.batched(columns, max(1, LINE // self._rank)):
            own = [self._first + column for column in batch]
            pieces = [
                plgpu.load(
                    self.up.at[:, pl.ds(self._column + column, LINE)].T,
                    layout=plgpu.Layout.WGMMA_TRANSPOSED,
                    optimized=False,
                )
                for column in own
            ]
            for column, piece in zip(own, pieces, strict=True):
                values = (piece * self.scale[0]).astype(self.up_smem.dtype)
                self.up_smem.at[:, pl.ds(column, LINE)].T[...] = values
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready)
        plgpu.barrier_wait(self.ready)

    def _multiply(self, indices: Any, dout_smem: Any, xa_smem: Any, acc: Any) -> Any:
        """Adds a tile to the second product and stores its part of the first one."""
        (step,) = indices
        mine = pl.ds(self._first, self._own)
        plgpu.wgmma(acc, dout_smem.at[:, mine].transpose((1, 0)), xa_smem)

        # The warpgroups take turns.
        @pl.when(lax.rem(step, _WORKERS) == self.warpgroup)
        def _():
            @functools.partial(pl.run_scoped, narrow=accumulator(ROWS, self._rank))
            def _(narrow):
                plgpu.wgmma(narrow, dout_smem, self.up_smem.transpose((1, 0)))
                row = (self.part * self.steps + step) * ROWS
                self.dxa[self.index, pl.ds(row, ROWS)] = narrow[...]

        plgpu.wgmma_wait(0)
        return acc
