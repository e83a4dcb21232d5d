"""The odds of all tokens against a row's own on Hopper: no logits in memory.

One product, hidden states by head, whose epilogue takes `exp(logit - shift)` of the
float32 accumulator, adds it up along the row and stores it in 16 bits for the second
product. Blocks are those of `kernels.persistent_product`.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.persistent_product import (
    MULTIPLIERS,
    PIECE,
    TILE_K,
    TILE_M,
    PersistentProduct,
    ProductBlock,
)

KERNEL_NAME = "cross_entropy_odds"

_LOG2_E = math.log2(math.e)


def odds(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    shift: Float32[Array, " M"],
    *,
    tile_n: int,
    blocks: int,
) -> tuple[Float[Array, "M V"], Float32[Array, " M"]]:
    """Returns `exp(logit - shift)` and its sums along the rows, which may overflow.

    Args:
      hidden: 16 bits; M a multiple of `TILE_M`, D of `TILE_K`.
      head: V a multiple of `tile_n`.
      shift: Natural logarithm of what the exponentials are divided by.
      tile_n: Columns of a tile.
      blocks: Of the grid; as many as the device has multiprocessors.
    """
    (rows, features), vocabulary = hidden.shape, head.shape[0]
    product = PersistentProduct(
        tile_n=tile_n,
        grid=(rows // TILE_M, vocabulary // tile_n),
        steps=features // TILE_K,
        is_transposed=True,
    )
    parts = MULTIPLIERS * product.grid[1]
    values, sums = product.kernel(
        functools.partial(_body, product=product),
        out_type=[
            jax.ShapeDtypeStruct((rows, vocabulary), hidden.dtype),
            jax.ShapeDtypeStruct((parts, rows), jnp.float32),
        ],
        blocks=blocks,
        name=KERNEL_NAME,
        approx_math=True,
    )(hidden, head, shift * _LOG2_E)
    return values, jnp.sum(sums, axis=0)


def _body(
    hidden_gmem,
    head_gmem,
    shift_gmem,
    values_gmem,
    sums_gmem,
    *,
    product: PersistentProduct,
    **memory,
) -> None:
    block = ProductBlock(product=product, **memory)
    tile_n, warpgroup = product.tile_n, lax.axis_index("warpgroup")

    def load(m, n, step):
        block.stream(hidden_gmem, head_gmem, m, n, step, product.steps)

    def epilogue(m, n, _):
        shifts = [
            plgpu.load(
                shift_gmem.at[pl.ds(m * TILE_M + i, PIECE)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            for i in range(0, TILE_M, PIECE)
        ]
        return functools.partial(store, shifts, m, n)

    def store(shifts, m, n, logits):
        row, column = m * TILE_M, n * tile_n + warpgroup * block.columns
        index = 0
        for i, shift in zip(range(0, TILE_M, PIECE), shifts, strict=True):
            terms = []
            for j in range(0, block.columns, PIECE):
                logit = logits[i : i + PIECE, j : j + PIECE]
                shifts_of_row = lax.broadcast_in_dim(shift, logit.shape, (0,))
                terms.append(jnp.exp2(logit * _LOG2_E - shifts_of_row))
                at = (pl.ds(row + i, PIECE), pl.ds(column + j, PIECE))
                piece_smem = block.placed(index, terms[-1])
                plgpu.copy_smem_to_gmem(piece_smem, values_gmem.at[at])
                index += 1
            sums = sums_gmem.at[n * MULTIPLIERS + warpgroup, pl.ds(row + i, PIECE)]
            sums[...] = jnp.sum(functools.reduce(operator.add, terms), axis=1)

    block.run(load, epilogue)
