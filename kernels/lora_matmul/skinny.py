"""Products with a low rank on Hopper, at the speed at which memory is read.

`low_rank_product` is `x @ down^T`, `low_rank_gradient` is `x^T @ t`. Both stream the
wide matrix once; the narrow operand stays in the L2 cache. Where rows or columns alone
do not fill the device, the contracted axis is split and the parts, in float32, are
added in a fixed order, so that results are the same in every run.

Budget of a block: that of `kernels.streaming`; one warpgroup multiplies. The functions
are compiled ones, so that equal calls in a program are lowered once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.streaming import (
    LINE,
    ROWS,
    launch,
    num_parts,
    parts_type,
    streamed,
    sum_of_parts,
)
from kernels.wgmma import accumulator

PRODUCT_NAME = "low_rank_product"
GRADIENT_NAME = "low_rank_gradient"

MAX_RANK = 256
"""Ranks of a group together: columns of one wgmma instruction."""

_COLUMNS = 128


@functools.partial(jax.jit, static_argnames=("blocks",))
def low_rank_product(
    x: Float[Array, "M C"],
    down: Float[Array, "R C"],
    *,
    blocks: int,
) -> Float[Array, "M R"]:
    """Returns `x @ down^T`, accumulated in float32, in the dtype of `x`.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles.
    """
    rows, contracted = x.shape
    rank = down.shape[0]
    tile_c = math.gcd(contracted, 256 if rank <= LINE else 128)
    if rows % ROWS or tile_c % LINE or rank % 8 or rank > MAX_RANK:
        raise UnsupportedOp(f"{x.shape=} and {rank=} do not suit the tiles")
    splits = num_parts(rows // ROWS, contracted // tile_c, blocks)
    steps = contracted // tile_c // splits

    def body(x_gmem, down_gmem, out_gmem):
        row = pl.ds(lax.axis_index("row") * ROWS, ROWS)
        part = lax.axis_index("part")

        def finish(run):
            @functools.partial(pl.run_scoped, acc=accumulator(ROWS, rank))
            def _(acc):
                run(acc)
                out_gmem[part, row] = acc[...].astype(out_gmem.dtype)

        def multiply(_, x_smem, down_smem, acc):
            plgpu.wgmma(acc, x_smem, down_smem.transpose((1, 0)))
            plgpu.wgmma_wait(min(1, steps - 1))
            return acc

        columns = pl.ds(part * steps * tile_c, steps * tile_c)
        streamed(
            multiply,
            finish,
            steps,
            ((ROWS, tile_c), lambda k: (0, k)),
            ((rank, tile_c), lambda k: (0, k)),
        )(x_gmem.at[row, columns], down_gmem.at[:, columns])

    (parts,) = launch(
        PRODUCT_NAME,
        body,
        [parts_type(splits, (rows, rank), x.dtype)],
        (rows // ROWS, splits),
        x,
        down,
    )
    return sum_of_parts(parts, x.dtype)


@functools.partial(jax.jit, static_argnames=("blocks",))
def low_rank_gradient(
    x: Float[Array, "M C"],
    t: Float[Array, "M R"],
    *,
    blocks: int,
) -> Float32[Array, "C R"]:
    """Returns `x^T @ t` in float32, reading `x` once for every 64 columns of `t`.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles.
    """
    rows, columns = x.shape
    if rows % ROWS or columns % _COLUMNS or t.shape[1] % 8:
        raise UnsupportedOp(f"{x.shape=} and {t.shape=} do not suit the tiles")
    parts = [
        _line_gradient(x, t[:, start : start + LINE], blocks)
        for start in range(0, t.shape[1], LINE)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _line_gradient(x: jax.Array, t: jax.Array, blocks: int) -> jax.Array:
    """Returns `x^T @ t` of up to 64 columns."""
    (rows, columns), rank = x.shape, t.shape[1]
    splits = num_parts(columns // _COLUMNS, rows // ROWS, blocks)
    steps = rows // ROWS // splits

    def body(x_gmem, t_gmem, out_gmem):
        column = pl.ds(lax.axis_index("row") * _COLUMNS, _COLUMNS)
        part = lax.axis_index("part")

        def finish(run):
            @functools.partial(pl.run_scoped, acc=accumulator(_COLUMNS, LINE))
            def _(acc):
                run(acc)
                out_gmem[part, column] = acc[...][:, :rank]

        def multiply(_, x_smem, t_smem, acc):
            plgpu.wgmma(acc, x_smem.transpose((1, 0)), t_smem)
            plgpu.wgmma_wait(min(1, steps - 1))
            return acc

        some_rows = pl.ds(part * steps * ROWS, steps * ROWS)
        streamed(
            multiply,
            finish,
            steps,
            ((ROWS, _COLUMNS), lambda k: (k, 0)),
            ((ROWS, LINE), lambda k: (k, 0)),  # beyond the rank it reads zeros
        )(x_gmem.at[some_rows, column], t_gmem.at[some_rows])

    (parts,) = launch(
        GRADIENT_NAME,
        body,
        [jax.ShapeDtypeStruct((splits, columns, rank), jnp.float32)],
        (columns // _COLUMNS, splits),
        x,
        t,
    )
    return jnp.sum(parts, axis=0)
