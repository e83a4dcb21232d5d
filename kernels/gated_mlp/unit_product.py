"""The gated unit and its product with a low rank, in one reading of gate and up.

The unit is computed in registers and takes the place of the gate in shared memory, from
where it is both multiplied and stored. A block takes 64 rows, or a part of their
columns where rows alone do not fill the device; the parts of the product, in float32,
are then added in a fixed order.

Bytes an element: 4 read, 2 written; the narrow operand stays in the L2 cache. Budget of
a block: one warpgroup loads; one computes, 64 elements a thread at a time, in half the
cycles that memory takes for them; 144 KiB ring at rank 16 in four stages. On an H200
five and six were 4 % slower.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels.dispatch import UnsupportedOp
from kernels.streaming import (
    ROWS,
    launch,
    num_parts,
    parts_type,
    streamed,
    sum_of_parts,
)
from kernels.wgmma import accumulator

from .gates import gates

KERNEL_NAME = "gated_unit_product"

MAX_RANK = 128
"""With more, the narrow operand would fill most of the ring."""

_COLUMNS = 128
_STAGES = 4


@functools.partial(jax.jit, static_argnames=("activation", "blocks"))
def gated_unit_product(
    gate: Float[Array, "M F"],
    up: Float[Array, "M F"],
    down: Float[Array, "R F"],
    *,
    activation: str,
    blocks: int,
) -> tuple[Float[Array, "M F"], Float[Array, "M R"]]:
    """Returns `h = act(gate) * up`, rounded once, and `h @ down^T`, in their dtype.

    The unit is computed and the product accumulated in float32; the product is that of
    the rounded `h`.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles, or the rank exceeds the limit.
    """
    (rows, features), rank = gate.shape, down.shape[0]
    if rows % ROWS or features % _COLUMNS or rank % 8 or rank > MAX_RANK:
        raise UnsupportedOp(f"{gate.shape=} and {rank=} do not suit the tiles")
    parts = num_parts(rows // ROWS, features // _COLUMNS, blocks)
    steps = features // _COLUMNS // parts
    h, xa = launch(
        KERNEL_NAME,
        functools.partial(_body, steps=steps, activation=activation),
        [
            jax.ShapeDtypeStruct(gate.shape, gate.dtype),
            parts_type(parts, (rows, rank), gate.dtype),
        ],
        (rows // ROWS, parts),
        gate,
        up,
        down,
        approx_math=True,
    )
    return h, sum_of_parts(xa, gate.dtype)


def _body(
    gate_gmem, up_gmem, down_gmem, h_gmem, xa_gmem, *, steps: int, activation: str
) -> None:
    rank = down_gmem.shape[0]
    row = pl.ds(lax.axis_index("row") * ROWS, ROWS)
    part = lax.axis_index("part")
    columns = pl.ds(part * steps * _COLUMNS, steps * _COLUMNS)
    gate, up, h = (ref.at[row, columns] for ref in (gate_gmem, up_gmem, h_gmem))

    def context(run):
        @functools.partial(pl.run_scoped, acc=accumulator(ROWS, rank))
        def _(acc):
            run(acc)
            xa_gmem[part, row] = acc[...].astype(xa_gmem.dtype)
            plgpu.wait_smem_to_gmem(0)

    def work(indices, gate_smem, up_smem, down_smem, acc):
        (step,) = indices
        active, _ = gates(_in_float32(gate_smem), activation)
        unit = active * _in_float32(up_smem)
        h_smem = gate_smem
        h_smem[...] = unit.astype(h_gmem.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(acc, h_smem, down_smem.transpose((1, 0)))
        here = pl.ds(step * _COLUMNS, _COLUMNS)
        plgpu.copy_smem_to_gmem(h_smem, h.at[:, here])
        # The tiles of the step before are free now; of a single step, its own.
        plgpu.wgmma_wait(min(1, steps - 1))
        plgpu.wait_smem_to_gmem(min(1, steps - 1), wait_read_only=True)
        return acc

    streamed(
        work,
        context,
        steps,
        ((ROWS, _COLUMNS), lambda k: (0, k)),
        ((ROWS, _COLUMNS), lambda k: (0, k)),
        ((rank, _COLUMNS), lambda k: (0, k)),
        max_stages=_STAGES,
    )(gate, up, down_gmem.at[:, columns])


def _in_float32(tile):
    return tile[...].astype(jnp.float32)
