"""Products with a low rank on Hopper, at the speed at which memory is read.

`low_rank_product` is `x @ down^T`, `low_rank_gradient` is `x^T @ t`, and
`low_rank_cotangents` is both of the same matrix in one reading. All stream the wide
matrix once; the narrow operand stays in the L2 cache. Where rows or columns alone do
not fill the device, the contracted axis is split and the parts, in float32, are added
in a fixed order, so that results are the same in every run.

Budget of a block: that of `kernels.streaming`; one or two warpgroups multiply. The
functions are compiled ones, so that equal calls in a program are lowered once.
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
from kernels.streaming import launch
from kernels.streaming import num_parts as _splits
from kernels.streaming import streamed as _pipeline
from kernels.wgmma import accumulator, swizzled

PRODUCT_NAME = "low_rank_product"
GRADIENT_NAME = "low_rank_gradient"
COTANGENTS_NAME = "low_rank_cotangents"

MAX_RANK = 256
"""Ranks of a group together: columns of one wgmma instruction."""

_LINE = 64  # elements of 16 bits in a swizzled line
MAX_COTANGENT_RANK = _LINE
_ROWS = 64
_COLUMNS = 128
_SLAB = 512


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
    tile_c = math.gcd(contracted, 256 if rank <= _LINE else 128)
    if rows % _ROWS or tile_c % _LINE or rank % 8 or rank > MAX_RANK:
        raise UnsupportedOp(f"{x.shape=} and {rank=} do not suit the tiles")
    splits = _splits(rows // _ROWS, contracted // tile_c, blocks)
    steps = contracted // tile_c // splits
    is_split = splits > 1

    def body(x_gmem, down_gmem, out_gmem):
        row = pl.ds(lax.axis_index("row") * _ROWS, _ROWS)
        part = lax.axis_index("part")

        def finish(run):
            @functools.partial(pl.run_scoped, acc=accumulator(_ROWS, rank))
            def _(acc):
                run(acc)
                out_gmem[part, row] = acc[...].astype(out_gmem.dtype)

        def multiply(_, x_smem, down_smem, acc):
            plgpu.wgmma(acc, x_smem, down_smem.transpose((1, 0)))
            plgpu.wgmma_wait(min(1, steps - 1))
            return acc

        columns = pl.ds(part * steps * tile_c, steps * tile_c)
        _pipeline(
            multiply,
            finish,
            steps,
            ((_ROWS, tile_c), lambda k: (0, k)),
            ((rank, tile_c), lambda k: (0, k)),
        )(x_gmem.at[row, columns], down_gmem.at[:, columns])

    dtype = jnp.float32 if is_split else x.dtype
    (parts,) = _launch(
        PRODUCT_NAME,
        body,
        [(splits, rows, rank)],
        dtype,
        (rows // _ROWS, splits),
        x,
        down,
    )
    return jnp.sum(parts, axis=0).astype(x.dtype) if is_split else parts[0]


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
    if rows % _ROWS or columns % _COLUMNS or t.shape[1] % 8:
        raise UnsupportedOp(f"{x.shape=} and {t.shape=} do not suit the tiles")
    parts = [
        _line_gradient(x, t[:, start : start + _LINE], blocks)
        for start in range(0, t.shape[1], _LINE)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _line_gradient(x: jax.Array, t: jax.Array, blocks: int) -> jax.Array:
    """Returns `x^T @ t` of up to 64 columns."""
    (rows, columns), rank = x.shape, t.shape[1]
    splits = _splits(columns // _COLUMNS, rows // _ROWS, blocks)
    steps = rows // _ROWS // splits

    def body(x_gmem, t_gmem, out_gmem):
        column = pl.ds(lax.axis_index("row") * _COLUMNS, _COLUMNS)
        part = lax.axis_index("part")

        def finish(run):
            @functools.partial(pl.run_scoped, acc=accumulator(_COLUMNS, _LINE))
            def _(acc):
                run(acc)
                out_gmem[part, column] = acc[...][:, :rank]

        def multiply(_, x_smem, t_smem, acc):
            plgpu.wgmma(acc, x_smem.transpose((1, 0)), t_smem)
            plgpu.wgmma_wait(min(1, steps - 1))
            return acc

        some_rows = pl.ds(part * steps * _ROWS, steps * _ROWS)
        _pipeline(
            multiply,
            finish,
            steps,
            ((_ROWS, _COLUMNS), lambda k: (k, 0)),
            ((_ROWS, _LINE), lambda k: (k, 0)),  # beyond the rank it reads zeros
        )(x_gmem.at[some_rows, column], t_gmem.at[some_rows])

    (parts,) = _launch(
        GRADIENT_NAME,
        body,
        [(splits, columns, rank)],
        jnp.float32,
        (columns // _COLUMNS, splits),
        x,
        t,
    )
    return jnp.sum(parts, axis=0)


@functools.partial(jax.jit, static_argnames=("blocks",))
def low_rank_cotangents(
    dout: Float[Array, "M N"],
    up: Float[Array, "R N"],
    xa: Float[Array, "M R"],
    *,
    blocks: int,
) -> tuple[Float[Array, "M R"], Float32[Array, "N R"]]:
    """Returns `dout @ up^T` in the dtype of `dout` and `dout^T @ xa` in float32.

    A block goes down the rows of a slab of columns. The second product of a slab stays
    in registers; the first one's parts, one for each slab, are added afterwards.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles, or the rank exceeds a line.
    """
    (rows, columns), rank = dout.shape, up.shape[0]
    slab = math.gcd(columns, _SLAB)
    if rows % _ROWS or slab % _COLUMNS or rank % 8 or rank > MAX_COTANGENT_RANK:
        raise UnsupportedOp(f"{dout.shape=} and {rank=} do not suit the tiles")
    splits = _splits(columns // slab, rows // _ROWS, blocks)
    steps = rows // _ROWS // splits
    my_columns = slab // 2

    def body(dout_gmem, up_gmem, xa_gmem, dxa_gmem, db_gmem, up_smem, ready):
        index, part = lax.axis_index("row"), lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        columns_of_slab = pl.ds(index * slab, slab)
        some_rows = pl.ds(part * steps * _ROWS, steps * _ROWS)

        def finish(run):
            @functools.partial(pl.run_scoped, acc=accumulator(my_columns, _LINE))
            def _(acc):
                @pl.when(warpgroup == 0)
                def _():
                    up = up_gmem.at[:, columns_of_slab]
                    plgpu.copy_gmem_to_smem(up, up_smem, ready)

                plgpu.barrier_wait(ready)
                run(acc)
                first = index * slab + warpgroup * my_columns
                db_gmem[part, pl.ds(first, my_columns)] = acc[...][:, :rank]

        def multiply(indices, dout_smem, xa_smem, acc):
            (step,) = indices
            mine = pl.ds(warpgroup * my_columns, my_columns)
            plgpu.wgmma(acc, dout_smem.at[:, mine].transpose((1, 0)), xa_smem)

            # The warpgroups take turns.
            @pl.when(lax.rem(step, 2) == warpgroup)
            def _():
                @functools.partial(pl.run_scoped, narrow=accumulator(_ROWS, rank))
                def _(narrow):
                    plgpu.wgmma(narrow, dout_smem, up_smem.transpose((1, 0)))
                    row = pl.ds((part * steps + step) * _ROWS, _ROWS)
                    dxa_gmem[index, row] = narrow[...]

            plgpu.wgmma_wait(0)
            return acc

        _pipeline(
            multiply,
            finish,
            steps,
            ((_ROWS, slab), lambda k: (k, 0)),
            ((_ROWS, _LINE), lambda k: (k, 0)),  # beyond the rank it reads zeros
            multipliers=2,
        )(
            dout_gmem.at[some_rows, columns_of_slab],
            xa_gmem.at[some_rows],
        )

    dxa, db = _launch(
        COTANGENTS_NAME,
        body,
        [(columns // slab, rows, rank), (splits, columns, rank)],
        jnp.float32,
        (columns // slab, splits),
        dout,
        up,
        xa,
        multipliers=2,
        scratch_types=[
            plgpu.SMEM((rank, slab), up.dtype, transforms=swizzled(_LINE, up.dtype)),
            plgpu.Barrier(),
        ],
    )
    return jnp.sum(dxa, axis=0).astype(dout.dtype), jnp.sum(db, axis=0)


def _launch(
    name: str,
    body,
    shapes,
    dtype,
    grid: tuple[int, int],
    *operands,
    multipliers: int = 1,
    scratch_types=(),
):
    out_type = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return launch(
        name,
        body,
        out_type,
        grid,
        *operands,
        multipliers=multipliers,
        scratch_types=scratch_types,
    )
