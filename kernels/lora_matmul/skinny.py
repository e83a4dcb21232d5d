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
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.dispatch import UnsupportedOp
from kernels.streaming import LINE, ROWS, launch, num_parts, streamed
from kernels.wgmma import accumulator, swizzled

PRODUCT_NAME = "low_rank_product"
GRADIENT_NAME = "low_rank_gradient"
COTANGENTS_NAME = "low_rank_cotangents"

MAX_RANK = 256
"""Ranks of a group together: columns of one wgmma instruction."""

MAX_COTANGENT_RANK = LINE
MAX_GROUPED_RANK = 32
"""Above, `low_rank_cotangents` of several matrices has too few registers."""

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
    tile_c = math.gcd(contracted, 256 if rank <= LINE else 128)
    if rows % ROWS or tile_c % LINE or rank % 8 or rank > MAX_RANK:
        raise UnsupportedOp(f"{x.shape=} and {rank=} do not suit the tiles")
    splits = num_parts(rows // ROWS, contracted // tile_c, blocks)
    steps = contracted // tile_c // splits
    is_split = splits > 1

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

    dtype = jnp.float32 if is_split else x.dtype
    (parts,) = launch(
        PRODUCT_NAME,
        body,
        [jax.ShapeDtypeStruct((splits, rows, rank), dtype)],
        (rows // ROWS, splits),
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


@functools.partial(jax.jit, static_argnames=("starts", "blocks"))
def low_rank_cotangents(
    douts: Sequence[Float[Array, "M _"]],
    ups: Sequence[Float32[Array, "R _"]],
    scales: Sequence[Float32[Array, ""]],
    xa: Float[Array, "M W"],
    *,
    starts: tuple[int, ...],
    blocks: int,
) -> tuple[list[Float[Array, "M R"]], list[Float32[Array, "_ R"]]]:
    """Returns `dout @ (scale * up)^T` and, in float32, `dout^T @ xa` of each `dout`.

    In one launch. A block goes down the rows of a slab of columns. The second product
    of a slab stays in registers; the first one's parts, one for each slab, are added
    afterwards.

    Args:
      douts: Of 16 bits.
      ups: Scaled ones are rounded to the dtype of `douts`.
      scales: Of each of `ups`.
      xa: What each of `douts` is multiplied with, side by side.
      starts: Where in `xa` the R columns of each one begin.
      blocks: As many as the device has multiprocessors.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles, or the rank exceeds a line.
    """
    rows, rank, dtype = douts[0].shape[0], ups[0].shape[0], douts[0].dtype
    widths = [dout.shape[1] for dout in douts]
    slab = math.gcd(_SLAB, *widths)
    if rows % ROWS or slab % _COLUMNS or rank % 8 or rank > MAX_COTANGENT_RANK:
        raise UnsupportedOp(f"{rows=}, {widths=} and {rank=} do not suit the tiles")
    ends = [0, *itertools.accumulate(width // slab for width in widths)]
    splits = num_parts(ends[-1], rows // ROWS, blocks)
    steps = rows // ROWS // splits
    my_columns, count = slab // 2, len(douts)
    narrow = [_on_a_line(xa, start, rank) for start in starts]

    def body(*refs):
        *matrices, dxa_gmem, db_gmem, up_smem, ready = refs
        index, part = lax.axis_index("row"), lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        some_rows = pl.ds(part * steps * ROWS, steps * ROWS)

        def place(up_gmem, scale_gmem, slab_of_up):
            """Writes this warpgroup's columns of a slab to shared memory, rounded."""
            columns = range(0, my_columns, LINE)
            # Loads pass no store: one by one, their latencies would add up.
            for batch in itertools.batched(columns, max(1, LINE // rank)):
                own = [warpgroup * my_columns + column for column in batch]
                pieces = [
                    plgpu.load(
                        up_gmem.at[:, pl.ds(slab_of_up * slab + column, LINE)].T,
                        layout=plgpu.Layout.WGMMA_TRANSPOSED,
                        optimized=False,
                    )
                    for column in own
                ]
                for column, piece in zip(own, pieces, strict=True):
                    values = (piece * scale_gmem[0]).astype(up_smem.dtype)
                    up_smem.at[:, pl.ds(column, LINE)].T[...] = values
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

        def finish(place_own, offset, run):
            place_own()

            @functools.partial(pl.run_scoped, acc=accumulator(my_columns, LINE))
            def _(acc):
                run(acc)
                first = index * slab + warpgroup * my_columns
                own = acc[...][:, offset : offset + rank]
                db_gmem[part, pl.ds(first, my_columns)] = own

        def multiply(indices, dout_smem, xa_smem, acc):
            (step,) = indices
            mine = pl.ds(warpgroup * my_columns, my_columns)
            plgpu.wgmma(acc, dout_smem.at[:, mine].transpose((1, 0)), xa_smem)

            # The warpgroups take turns.
            @pl.when(lax.rem(step, 2) == warpgroup)
            def _():
                @functools.partial(pl.run_scoped, narrow=accumulator(ROWS, rank))
                def _(narrow):
                    plgpu.wgmma(narrow, dout_smem, up_smem.transpose((1, 0)))
                    row = pl.ds((part * steps + step) * ROWS, ROWS)
                    dxa_gmem[index, row] = narrow[...]

            plgpu.wgmma_wait(0)
            return acc

        def go_down(own, own_slab, start):
            dout_gmem, up_gmem, scale_gmem, xa_gmem = own
            line, offset = divmod(start, LINE)
            place_own = functools.partial(place, up_gmem, scale_gmem, own_slab)
            streamed(
                multiply,
                functools.partial(finish, place_own, offset),
                steps,
                ((ROWS, slab), lambda k: (k, 0)),
                ((ROWS, LINE), lambda k: (k, line)),  # beyond the end it reads zeros
                multipliers=2,
            )(
                dout_gmem.at[some_rows, pl.ds(own_slab * slab, slab)],
                xa_gmem.at[some_rows],
            )

        for i, (first, end) in enumerate(itertools.pairwise(ends)):

            @pl.when((index >= first) & (index < end))
            def _(i=i, first=first):
                own = matrices[i::count]
                go_down(own, index - first, start=narrow[i][1])

    dxa, db = launch(
        COTANGENTS_NAME,
        body,
        [
            jax.ShapeDtypeStruct((ends[-1], rows, rank), jnp.float32),
            jax.ShapeDtypeStruct((splits, sum(widths), rank), jnp.float32),
        ],
        (ends[-1], splits),
        *douts,
        *ups,
        *(scale.reshape(1) for scale in scales),
        *(array for array, _ in narrow),
        multipliers=2,
        scratch_types=[
            plgpu.SMEM((rank, slab), dtype, transforms=swizzled(LINE, dtype)),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
    pairs = [*itertools.pairwise(ends)]
    return (
        [jnp.sum(dxa[i:j], axis=0).astype(dtype) for i, j in pairs],
        [jnp.sum(db[:, i * slab : j * slab], axis=0) for i, j in pairs],
    )


def _on_a_line(xa: jax.Array, start: int, rank: int) -> tuple[jax.Array, int]:
    """Returns an array with these columns of `xa` within 64, and where they begin."""
    if start % LINE + rank <= LINE:
        return xa, start
    return xa[:, start : start + rank], 0
