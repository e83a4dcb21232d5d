"""The unit's gradient and the narrow products of all three adapters, in one reading.

The adapters' gradients need narrow products with the cotangents of gate and up and with
the unit's result. They are made here from the tiles that are in shared memory anyhow:
gate, up and their unit's cotangent are read once, the cotangents of gate and up written
once, and the unit's result is never in memory.

A block goes down the rows of a slab of columns. What is contracted along the rows stays
in registers; of what is contracted along the columns each slab has a part, and so has
each block of the rows; a later launch adds the parts. Budget of a block at three ranks
of 16: one warpgroup loads, two compute, 240 registers a thread, of which 112 hold
accumulators; 144 KiB ring, whose places also hold the results while they are stored.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.ring import Ring
from kernels.wgmma import accumulator, swizzled

from .gates import gates

KERNEL_NAME = "unit_cotangents"

MAX_RANK = 16
"""Of an adapter: a slab has this room for accumulators in registers."""

_TILE = 64  # rows and columns
_PIECE = 32  # rows computed at a time
_MATRICES = 3  # gate, up and their unit's cotangent; then what replaces them
_WORKERS = 2
_LOADER = _WORKERS
_LOADER_REGISTERS, _WORKER_REGISTERS = 24, 240
_SLAB = 512  # columns of a block, at most
# Even: each place is always the same warpgroup's. Two for each at least: one is freed
# when the next one is computed. With more on their way, memory is slower.
_STAGES = 6
_NARROW_STAGES = 2


class UnitCotangents(NamedTuple):
    """What the backward pass needs of the unit.

    Attributes:
      dgate: Cotangent of gate.
      dup: Cotangent of up.
      dxa: `dgate @ up_g^T` and `dup @ up_u^T` side by side, in parts that are still to
        be added along the first axis.
      sums: `dgate^T`, `dup^T` and `unit^T` times their narrow matrices, side by side
        and in parts.
    """

    dgate: Float[Array, "M F"]
    dup: Float[Array, "M F"]
    dxa: Float32[Array, "_ M Rx"]
    sums: Float32[Array, "_ F R"]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Static facts of a launch.

    Attributes:
      rows: M, in tiles.
      features: F.
      ranks: Of the adapters of gate, up and what follows the unit.
      splits: Blocks along the rows.
      activation: As in `gated_activation`.
    """

    rows: int
    features: int
    ranks: tuple[int, int, int]
    splits: int
    activation: str

    @property
    def slab(self) -> int:
        """Columns of a block."""
        return _slab(self.features)

    @property
    def tiles(self) -> int:
        """Tiles in a row of the slab; the warpgroups take them in turn."""
        return self.slab // _TILE

    @property
    def own(self) -> int:
        """Tiles of such a row that are one warpgroup's."""
        return self.tiles // _WORKERS

    @property
    def starts(self) -> list[int]:
        """Where each adapter's columns start among all, and where they end."""
        return [0, *itertools.accumulate(self.ranks)]

    @property
    def ups(self) -> int:
        """Ranks of gate and up together."""
        return self.starts[2]


@functools.partial(jax.jit, static_argnames=("ranks", "activation", "blocks"))
def unit_cotangents(
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    dout: Float[Array, "M F"],
    ups: Float[Array, "Rx F"],
    narrow: Float[Array, "R M"],
    *,
    ranks: tuple[int, int, int],
    activation: str,
    blocks: int,
) -> UnitCotangents:
    """Returns the cotangents of gate and up, and narrow products, of rounded factors.

    Args:
      gate: Argument of the activation.
      up: What it is multiplied with.
      dout: Cotangent of `act(gate) * up`.
      ups: What the cotangents of gate and up are multiplied with, one above the other.
      narrow: What the transposed cotangents of gate and up and the transposed unit are
        multiplied with, one above the other.
      ranks: The heights in `narrow`; the first two are those in `ups`. Each is a
        multiple of 8; 0 leaves its products out.
      activation: As in `gated_activation`.
      blocks: Of the grid; as many as the device has multiprocessors.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles, or the ranks do not suit.
    """
    rows, features = gate.shape
    if rows % _TILE or features % (_WORKERS * _TILE) or not suits(ranks):
        raise UnsupportedOp(f"{gate.shape=} and {ranks=} do not suit the tiles")
    rows //= _TILE
    slabs = features // _slab(features)
    splits = max(1, min(rows, blocks // slabs))
    plan = _Plan(
        rows=rows, features=features, ranks=ranks, splits=splits, activation=activation
    )
    return UnitCotangents(*_launch(plan, gate, up, dout, ups, narrow))


def suits(ranks: tuple[int, int, int]) -> bool:
    """Whether the kernel takes adapters of these ranks: one of gate or up at least."""
    return any(ranks[:2]) and all(rank % 8 == 0 and rank <= MAX_RANK for rank in ranks)


def _slab(features: int) -> int:
    """Returns the columns of a block."""
    return math.gcd(features, _SLAB)


def _launch(plan: _Plan, *operands: jax.Array) -> list[jax.Array]:
    gate, *_ = operands
    slabs, all_ranks = plan.features // plan.slab, plan.starts[3]
    dtype, tiled = gate.dtype, swizzled(_TILE, gate.dtype)
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct(gate.shape, dtype),
            jax.ShapeDtypeStruct(gate.shape, dtype),
            jax.ShapeDtypeStruct((slabs, gate.shape[0], plan.ups), jnp.float32),
            jax.ShapeDtypeStruct((plan.splits, plan.features, all_ranks), jnp.float32),
        ],
        scratch_types={
            "ring": plgpu.SMEM(
                (_STAGES, _MATRICES, _TILE, _TILE), dtype, transforms=tiled
            ),
            "ups_smem": plgpu.SMEM((plan.ups, plan.slab), dtype, transforms=tiled),
            "narrow_smem": plgpu.SMEM(
                (_NARROW_STAGES, all_ranks, _TILE), dtype, transforms=tiled
            ),
            "half_smem": plgpu.SMEM((_TILE, plan.ups), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=_MATRICES, num_barriers=_STAGES),
            "empty": plgpu.Barrier(num_barriers=_STAGES),
            "ups_full": plgpu.Barrier(),
            "narrow_full": plgpu.Barrier(num_barriers=_NARROW_STAGES),
            "narrow_empty": plgpu.Barrier(
                num_arrivals=_WORKERS, num_barriers=_NARROW_STAGES
            ),
            "half_full": plgpu.Barrier(),
            "half_empty": plgpu.Barrier(),
        },
        grid=(slabs, plan.splits),
        grid_names=("slab", "part"),
        num_threads=_WORKERS + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _body(*refs: Any, plan: _Plan, **memory: Any) -> None:
    inputs, outputs = refs[:5], refs[5:]
    block = _Block(plan=plan, **memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        block.load(*inputs)

    @pl.when(warpgroup < _LOADER)
    def _():
        plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        block.work(*outputs)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A block at its work, inside of the kernel.

    Attributes:
      plan: Static facts.
      ring: Tiles of gate, up and their unit's cotangent; the warpgroups take steps in
        turn and put in their place what they make of them.
      ups_smem: The slab of `ups`.
      narrow_smem: Columns of `narrow`.
      half_smem: One warpgroup's part of `dxa`, to which the other adds its own.
    """

    plan: _Plan
    ring: Any
    ups_smem: Any
    narrow_smem: Any
    half_smem: Any
    full: Any
    empty: Any
    ups_full: Any
    narrow_full: Any
    narrow_empty: Any
    half_full: Any
    half_empty: Any

    @property
    def _count(self) -> Any:
        """The number of this block's tiles along the rows."""
        part, splits = lax.axis_index("part"), self.plan.splits
        return lax.div(self.plan.rows - part + splits - 1, splits)

    def _rows(self, row: Any) -> Any:
        """The blocks take turns, so that all are in the same part of memory."""
        start = (row * self.plan.splits + lax.axis_index("part")) * _TILE
        return pl.ds(start, _TILE)

    def _columns(self, tile: Any) -> Any:
        start = lax.axis_index("slab") * self.plan.slab + tile * _TILE
        return pl.ds(start, _TILE)

    def load(self, gate: Any, up: Any, dout: Any, ups: Any, narrow: Any) -> None:
        """Copies operands into shared memory."""
        slab = pl.ds(lax.axis_index("slab") * self.plan.slab, self.plan.slab)
        plgpu.copy_gmem_to_smem(ups.at[:, slab], self.ups_smem, self.ups_full)

        narrow_ring = Ring((self.narrow_smem,), self.narrow_full, self.narrow_empty)
        ring = Ring((self.ring,), self.full, self.empty)

        def load_row(row, _):
            rows = self._rows(row)
            narrow_ring.fill(row, narrow.at[:, rows])

            def load_tile(tile, _):
                at = ring.claim(row * self.plan.tiles + tile)
                for matrix, source in enumerate((gate, up, dout)):
                    plgpu.copy_gmem_to_smem(
                        source.at[rows, self._columns(tile)],
                        self.ring.at[at, matrix],
                        self.full.at[at],
                    )

            lax.fori_loop(0, self.plan.tiles, load_tile, None)

        lax.fori_loop(0, self._count, load_row, None)
        narrow_ring.drain(self._count)
        ring.drain(self._count * self.plan.tiles)

    def work(self, dgate: Any, dup: Any, dxa: Any, sums: Any) -> None:
        """Computes every other tile and stores all results."""
        plan, warpgroup = self.plan, lax.axis_index("warpgroup")

        @functools.partial(
            pl.run_scoped,
            accs=[[_accumulator(rank) for rank in plan.ranks] for _ in range(plan.own)],
        )
        def _(accs):
            plgpu.barrier_wait(self.ups_full)

            def work_row(row, _):
                place = lax.rem(row, _NARROW_STAGES)
                plgpu.barrier_wait(self.narrow_full.at[place])

                @functools.partial(
                    pl.run_scoped, parts=[_accumulator(rank) for rank in plan.ranks[:2]]
                )
                def _(parts):
                    for index, own in enumerate(accs):
                        step = row * plan.tiles + index * _WORKERS + warpgroup
                        self._work_step(row, step, (own, parts), (dgate, dup))
                    plgpu.barrier_arrive(self.narrow_empty.at[place])
                    self._store_parts(row, parts, dxa)

            lax.fori_loop(0, self._count, work_row, None)
            steps = self._count * plan.tiles
            self._release(steps - _WORKERS + warpgroup, pending=0)

            @pl.when(warpgroup == 0)
            def _():
                plgpu.barrier_wait(self.half_empty)

            for index, own in enumerate(accs):
                columns = self._columns(index * _WORKERS + warpgroup)
                for matrix, acc in enumerate(own):
                    if acc is not None:
                        at = lax.axis_index("part"), columns, self._ranks(matrix)
                        sums[at] = acc[...]

    def _work_step(self, row: Any, step: Any, accs: Any, outputs: Any) -> None:
        """Takes a tile: its cotangents go to memory and into the narrow products."""
        slot = lax.rem(step, _STAGES)
        # The tile is a function of the row too, lest all that follows from it is kept
        # in registers through all rows.
        tile = lax.rem(step, self.plan.tiles)
        plgpu.barrier_wait(self.full.at[slot])
        self._replace(slot)
        at = (self._rows(row), self._columns(tile))
        for matrix, gmem in enumerate(outputs):
            plgpu.copy_smem_to_gmem(self.ring.at[slot, matrix], gmem.at[at])
        self._multiply(row, slot, tile, *accs)
        # This step's copies may go on while the next one is computed.
        self._release(step - _WORKERS, pending=len(outputs))

    def _release(self, step: Any, *, pending: int) -> None:
        """Frees the place of a step, if there is one, whose copies have been read."""
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)

        @pl.when(step >= 0)
        def _():
            plgpu.barrier_arrive(self.empty.at[lax.rem(step, _STAGES)])

    def _ranks(self, matrix: int) -> Any:
        return pl.ds(self.plan.starts[matrix], self.plan.ranks[matrix])

    def _replace(self, slot: Any) -> None:
        """Puts the cotangents and the unit in the place of what they are made of."""
        layout = plgpu.Layout.SMEM_GMEM_COPY((_PIECE, _TILE), self.ring.dtype, 128)
        for start in range(0, _TILE, _PIECE):
            places = [
                self.ring.at[slot, matrix, pl.ds(start, _PIECE)]
                for matrix in range(_MATRICES)
            ]
            gate, up, dout = (
                plgpu.load(place, layout=layout).astype(jnp.float32) for place in places
            )
            active, slope = gates(gate, self.plan.activation)
            results = dout * up * slope, dout * active, active * up
            for place, result in zip(places, results, strict=True):
                place[...] = result.astype(self.ring.dtype)
        plgpu.commit_smem()

    def _multiply(self, row: Any, slot: Any, tile: Any, accs: Any, parts: Any) -> None:
        narrow = self.narrow_smem.at[lax.rem(row, _NARROW_STAGES)]
        for matrix, acc in enumerate(accs):
            if acc is not None:
                right = narrow.at[self._ranks(matrix)].transpose((1, 0))
                left = self.ring.at[slot, matrix].transpose((1, 0))
                plgpu.wgmma(acc, left, right)
        for matrix, part in enumerate(parts):
            if part is not None:
                right = self.ups_smem.at[
                    self._ranks(matrix), pl.ds(tile * _TILE, _TILE)
                ]
                left = self.ring.at[slot, matrix]
                plgpu.wgmma(part, left, right.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    def _store_parts(self, row: Any, parts: Any, dxa: Any) -> None:
        """Adds both warpgroups' sums along their columns and stores them."""
        own = {i: part[...] for i, part in enumerate(parts) if part is not None}
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            @pl.when(row > 0)
            def _():
                plgpu.barrier_wait(self.half_empty)

            for matrix, value in own.items():
                self.half_smem[:, self._ranks(matrix)] = value
            plgpu.barrier_arrive(self.half_full)

        @pl.when(warpgroup == 1)
        def _():
            plgpu.barrier_wait(self.half_full)
            for matrix, value in own.items():
                other = self.half_smem[:, self._ranks(matrix)]
                target = (lax.axis_index("slab"), self._rows(row), self._ranks(matrix))
                dxa[target] = value + other
            plgpu.barrier_arrive(self.half_empty)


def _accumulator(rank: int) -> Any:
    return accumulator(_TILE, rank) if rank else None
