"""The cotangents of gate and up, in the epilogue of the product that makes dout.

The product is that of the next projection's cotangent with its weight. The tiles of
gate and up follow the operands of a tile through the same ring of shared memory, so
that they are there when the accumulator is done. `act(gate) * up` is written as well,
for the gradient of the next adapter. Blocks are those of `kernels.persistent_product`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.persistent_product import (
    PARTS,
    PIECE,
    PersistentProduct,
    ProductBlock,
    TileConfig,
)

from .gates import gates

KERNEL_NAME = "gated_cotangent_products"

TILES = TileConfig()

Term = tuple[jax.Array, jax.Array]
"""Operands (M, C) and (C, F), or (F, C), which is read transposed."""


@functools.partial(jax.jit, static_argnames=("activation", "is_transposed", "blocks"))
def gated_cotangents(
    terms: Sequence[Term],
    gate: jax.Array,
    up: jax.Array,
    *,
    activation: str,
    is_transposed: bool,
    blocks: int,
) -> list[jax.Array]:
    """Returns the cotangents of gate and up, and `act(gate) * up`, each (M, F).

    Args:
      terms: Their products' sum, which stays in float32, is the cotangent of
        `act(gate) * up`. M is a multiple of 128, F of 256; a rest of a step along C
        reads zeros.
      gate: (M, F).
      up: (M, F).
      activation: As in `gated_activation`.
      is_transposed: Right operands are (F, C) in memory.
      blocks: Of the grid; as many as the device has multiprocessors.
    """
    rows, features = gate.shape
    counts = [-(-left.shape[1] // TILES.tile_k) for left, _ in terms]
    product = PersistentProduct(
        tiles=TILES,
        stages=TILES.stages,
        grid=(rows // TILES.tile_m, features // TILES.tile_n),
        steps=sum(counts),
        is_transposed=is_transposed,
        rest=2 * PARTS,
    )
    operands = [ref for term in terms for ref in term]
    return product.kernel(
        functools.partial(_body, counts=counts, activation=activation, product=product),
        out_type=[jax.ShapeDtypeStruct(gate.shape, gate.dtype)] * 3,
        blocks=blocks,
        name=KERNEL_NAME,
        approx_math=True,
    )(*operands, gate, up)


def _body(
    *refs,
    counts: Sequence[int],
    activation: str,
    product: PersistentProduct,
    **memory,
) -> None:
    *operands, gate_gmem, up_gmem, dgate_gmem, dup_gmem, out_gmem = refs
    block = ProductBlock(product=product, **memory)

    def load(m, n, first):
        for left, right, count in zip(
            operands[::2], operands[1::2], counts, strict=True
        ):
            block.stream(left, right, m, n, first, count)
            first += count
        for part in range(PARTS):
            block.stream_part(gate_gmem, m, n, part, first + 2 * part)
            block.stream_part(up_gmem, m, n, part, first + 2 * part + 1)

    def epilogue(m, n, first):
        return functools.partial(store, m, n, first)

    def store(m, n, first, values):
        row = m * TILES.tile_m
        column = n * TILES.tile_n + lax.axis_index("warpgroup") * block.columns
        index = 0
        for part in range(PARTS):
            for i, j, both in block.pieces(part, first + 2 * part, matrices=2):
                gate, up = (value.astype(jnp.float32) for value in both)
                active, slope = gates(gate, activation)
                dout = values[i : i + PIECE, j : j + PIECE]
                at = (pl.ds(row + i, PIECE), pl.ds(column + j, PIECE))
                for gmem, result in (
                    (out_gmem, active * up),
                    (dup_gmem, dout * active),
                    (dgate_gmem, dout * up * slope),
                ):
                    piece_smem = block.placed(index, result)
                    plgpu.copy_smem_to_gmem(piece_smem, gmem.at[at])
                    index += 1

    block.run(load, epilogue)
