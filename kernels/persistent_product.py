"""A large matrix product on Hopper by persistent blocks: what such kernels share.

One warpgroup of a block copies operands into a ring of shared memory; two multiply,
each half of a tile's columns, and store. Budget at 128 x 256 x 64 with 4 stages:
192 KiB ring, 32 KiB results; 232 registers a thread that multiplies, of which 128 hold
the accumulator.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import UnsupportedOp
from kernels.ring import Ring
from kernels.wgmma import accumulator, swizzled

TILE_M = 128
"""Rows of a tile."""

TILE_K = 64
"""Contracted elements of one step: those of 16 bits are a swizzled line."""

MULTIPLIERS = 2
"""Warpgroups of a block that multiply, each half of a tile's columns."""

PIECE = 64
"""Rows and columns that are stored at a time."""

PARTS = 2
"""Steps that bring a tile of a matrix like the results to the epilogue."""

_STAGES = 4  # steps in shared memory at a time; three cost 8 % on an H200
_WIDTH = 8  # columns of tiles that blocks walk along together, for the L2 cache
_COPIES = 2  # that fill a step
_LOADER = MULTIPLIERS
_LOADER_REGISTERS, _MULTIPLIER_REGISTERS = 40, 232
_SLOTS = 2  # pieces on their way, for each multiplying warpgroup


def tile_n_for(rows: int, widths: Sequence[int]) -> int:
    """Returns the columns of a tile for results of `rows` and each of `widths`.

    Raises:
      UnsupportedOp: The sizes are no multiples of any tile.
    """
    for tile_n in (256, 128):
        if rows % TILE_M == 0 and all(width % tile_n == 0 for width in widths):
            return tile_n
    raise UnsupportedOp(f"{rows=} and {widths=} must be multiples of 128")


def has_parts(tile_n: int) -> bool:
    """Whether `stream_part` suits: a part fills the place of a right operand."""
    return tile_n == PARTS * TILE_M


@dataclass(frozen=True, kw_only=True)
class PersistentProduct:
    """Static facts of a kernel.

    Attributes:
      tile_n: Columns of a tile.
      grid: Tiles along the rows and along the columns.
      steps: Along the contracted axis, the same number for each tile.
      is_transposed: Right operands are (N, C) in memory, not (C, N).
      rest: Steps of the ring after those of a tile, which its epilogue reads.
    """

    tile_n: int
    grid: tuple[int, int]
    steps: int
    is_transposed: bool
    rest: int = 0

    @property
    def stages(self) -> int:
        """Steps in shared memory at a time."""
        return min(_STAGES, self.steps + self.rest)

    def kernel(
        self,
        body: Callable[..., None],
        *,
        out_type: Sequence[jax.ShapeDtypeStruct],
        blocks: int,
        name: str,
        approx_math: bool = False,
    ) -> Callable[..., Any]:
        """Returns the kernel, which takes the operands.

        Args:
          body: Takes the references of operands and results and, by name, those of
            `ProductBlock`.
          out_type: Results; the first one's dtype is that of the operands too.
          blocks: Of the grid; as many as the device has multiprocessors.
          name: Of the kernel.
          approx_math: Whether exponentials may be approximate.
        """
        dtype = out_type[0].dtype
        ring = swizzled(TILE_K, dtype)
        b_tile = (TILE_K, self.tile_n)
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types={
                "a_smem": plgpu.SMEM(
                    (self.stages, TILE_M, TILE_K), dtype, transforms=ring
                ),
                "b_smem": plgpu.SMEM(
                    (self.stages, *(b_tile[::-1] if self.is_transposed else b_tile)),
                    dtype,
                    transforms=ring,
                ),
                "out_smem": plgpu.SMEM(
                    (MULTIPLIERS, _SLOTS, PIECE, PIECE),
                    dtype,
                    transforms=swizzled(PIECE, dtype),
                ),
                "full": plgpu.Barrier(num_arrivals=_COPIES, num_barriers=self.stages),
                "empty": plgpu.Barrier(
                    num_arrivals=MULTIPLIERS, num_barriers=self.stages
                ),
            },
            grid=(min(blocks, self.grid[0] * self.grid[1]),),
            grid_names=("block",),
            num_threads=MULTIPLIERS + 1,
            thread_name="warpgroup",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=approx_math),
        )


@dataclass(frozen=True, kw_only=True)
class ProductBlock:
    """A block at its work: the ring and what happens with it, inside of a kernel."""

    product: PersistentProduct
    a_smem: Any
    b_smem: Any
    out_smem: Any
    full: Any
    empty: Any

    @property
    def columns(self) -> int:
        """Columns of a tile that are this warpgroup's."""
        return self.product.tile_n // MULTIPLIERS

    def run(
        self,
        load: Callable[[Any, Any, Any], None],
        epilogue: Callable[[Any, Any, Any], Callable[[Any], None]],
    ) -> None:
        """Takes this block's tiles, one after the other.

        Args:
          load: Streams the operands of tile (m, n); its third argument is the step of
            the ring that comes first.
          epilogue: Called for tile (m, n) before the multiplication, with the step of
            the ring after it; what it returns takes this warpgroup's float32 (TILE_M,
            columns).
        """

        @pl.when(lax.axis_index("warpgroup") == _LOADER)
        def _():
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            self._each_tile(load)
            for slot in range(self.product.stages):
                plgpu.barrier_wait(self.empty.at[slot])

        @pl.when(lax.axis_index("warpgroup") < _LOADER)
        def _():
            plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
            self._each_tile(functools.partial(self._multiply, epilogue))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _each_tile(self, run: Callable[[Any, Any, Any], None]) -> None:
        grid = self.product.grid

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _(loop):
            (index,) = loop.index
            m, n = plgpu.planar_snake(index, grid, 0, _WIDTH)
            run(m, n, loop.local_index * (self.product.steps + self.product.rest))

    def stream(self, left: Any, right: Any, m: Any, n: Any, first: Any, count: int):
        """Copies `count` steps of rows m and columns n, from step `first` of the ring.

        Args:
          left: Reference of (M, C); rows and columns are counted in tiles.
          right: Reference of (C, N), or (N, C) if the product is transposed.
          m: Tile along the rows.
          n: Tile along the columns.
          first: Step of the ring.
          count: Steps along C.
        """
        tile_n = self.product.tile_n

        def load_step(k, _):
            slot, full = self._emptied(first + k)
            contracted = pl.ds(k * TILE_K, TILE_K)
            columns = pl.ds(n * tile_n, tile_n)
            a = (pl.ds(m * TILE_M, TILE_M), contracted)
            b = (contracted, columns)
            if self.product.is_transposed:
                b = b[::-1]
            plgpu.copy_gmem_to_smem(left.at[a], self.a_smem.at[slot], full)
            plgpu.copy_gmem_to_smem(right.at[b], self.b_smem.at[slot], full)

        lax.fori_loop(0, count, load_step, None)

    def stream_part(self, source: Any, m: Any, n: Any, part: int, step: Any) -> None:
        """Copies a half of a tile for the epilogue, as one step.

        Args:
          source: Reference of a matrix like the results.
          m: Tile along the rows.
          n: Tile along the columns.
          part: Which half, of `PARTS`.
          step: Of the ring.
        """
        tile_n, is_transposed = self.product.tile_n, self.product.is_transposed
        slot, full = self._emptied(step)
        row, column = m * TILE_M, n * tile_n
        size = self.columns if is_transposed else PIECE // _COPIES
        for copy in range(_COPIES):
            # What is copied at once lies together in the place of a right operand.
            if is_transposed:
                columns = column + copy * self.columns + part * PIECE
                at = (pl.ds(row, TILE_M), pl.ds(columns, PIECE))
            else:
                rows = row + part * PIECE + copy * size
                at = (pl.ds(rows, size), pl.ds(column, tile_n))
            target = self.b_smem.at[slot, pl.ds(copy * size, size)]
            plgpu.copy_gmem_to_smem(source.at[at], target, full)

    def pieces(self, part: int, step: Any) -> Iterator[tuple[int, int, Any]]:
        """Yields this warpgroup's pieces of a part, and frees its place.

        Each as its first row and column, and the values there.

        Args:
          part: That `stream_part` brought.
          step: Of the ring.
        """
        is_transposed, own = self.product.is_transposed, part * PIECE
        slot = lax.rem(step, self.product.stages)
        plgpu.barrier_wait(self.full.at[slot])
        for place in (0, PIECE):
            along = pl.ds(lax.axis_index("warpgroup") * self.columns + place, PIECE)
            at = (along,) if is_transposed else (slice(None), along)
            values = self.b_smem.at[slot, *at][...]
            if place == PIECE:
                # Copies to come do not wait for these loads otherwise.
                plgpu.commit_smem()
                plgpu.barrier_arrive(self.empty.at[slot])
            if is_transposed:
                yield place, own, values
            else:
                yield own, place, values

    def _emptied(self, step: Any) -> tuple[Any, Any]:
        """Waits for the place of a step, which it returns with its barrier."""
        slot = Ring((self.a_smem, self.b_smem), self.full, self.empty).claim(step)
        return slot, self.full.at[slot]

    def _multiply(self, epilogue: Callable, m: Any, n: Any, first: Any) -> None:
        product, steps = self.product, self.product.steps
        store = epilogue(m, n, first + steps)
        mine = pl.ds(lax.axis_index("warpgroup") * self.columns, self.columns)

        def slot_of(step):
            return lax.rem(first + step, product.stages)

        @functools.partial(pl.run_scoped, acc=accumulator(TILE_M, self.columns))
        def _(acc):
            def multiply_step(k, _):
                slot = slot_of(k)
                plgpu.barrier_wait(self.full.at[slot])
                b = self.b_smem.at[slot]
                if product.is_transposed:
                    b = b.transpose((1, 0))
                plgpu.wgmma(acc, self.a_smem.at[slot], b.at[:, mine])
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(self.empty.at[slot_of(k - 1)])

            lax.fori_loop(0, steps, multiply_step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.empty.at[slot_of(steps - 1)])
            store(acc[...])

    def placed(self, index: int, piece: Any) -> Any:
        """Returns shared memory with a piece of this tile, the `index`-th, to copy."""
        memory = self.out_smem.at[lax.axis_index("warpgroup"), index % _SLOTS]
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        memory[...] = piece.astype(self.out_smem.dtype)
        plgpu.commit_smem()
        return memory
