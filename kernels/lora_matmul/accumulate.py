"""Sums of matrix products on Hopper, each sum in one accumulator.

`y[g] = sum over s of lhs[g, s] @ rhs[g, s]`: the low-rank product of an adapter is one
more step of the loop over the contracted axis, and the gradient of an input that
several weights read is one loop over all of them. Nothing is joined or added in memory.
Blocks are those of `kernels.persistent_product`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import UnsupportedOp
from kernels.persistent_product import (
    PARTS,
    PIECE,
    TILE_K,
    TILE_M,
    PersistentProduct,
    ProductBlock,
)

KERNEL_NAME = "accumulated_products"

Term = tuple[jax.Array, jax.Array]
"""Operands (M, C) and (C, N), or (M, C) and (N, C), which is read transposed."""


@dataclass(frozen=True)
class _Sum:
    """Static facts of one output: its tiles along N, its terms' operands and steps."""

    first: int
    end: int
    operands: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]


def accumulated_products(
    sums: Sequence[Sequence[Term]],
    *,
    is_transposed: bool,
    tile_n: int,
    blocks: int,
    shared: Term | None = None,
    added: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Returns a matrix for each of `sums`, accumulated in float32, rounded once.

    Args:
      sums: The terms of each output. All have M rows and the same number of steps along
        the contracted axes; a rest of a step reads zeros.
      is_transposed: Right operands are (N, C) in memory.
      tile_n: Columns of a tile.
      blocks: Of the grid; as many as the device has multiprocessors.
      shared: One more term of every sum. Its right operand has the columns of all
        outputs side by side.
      added: To the output, where there is one, before it is rounded.

    Raises:
      UnsupportedOp: Sizes are no multiples of the tiles.
    """
    plan, lhs, rhs = _plan(sums, is_transposed, tile_n)
    if shared is not None:
        lhs, rhs = [*lhs, shared[0]], [*rhs, shared[1]]
    rows = lhs[0].shape[0]
    if rows % TILE_M:
        raise UnsupportedOp(f"{rows} rows are no multiple of {TILE_M}")
    return _launch(
        lhs,
        rhs,
        list(added),
        plan=plan,
        shared_steps=0 if shared is None else _steps(shared[0]),
        is_transposed=is_transposed,
        tile_n=tile_n,
        blocks=blocks,
    )


@functools.partial(
    jax.jit,
    static_argnames=("plan", "shared_steps", "is_transposed", "tile_n", "blocks"),
)
def _launch(
    lhs: list[jax.Array],
    rhs: list[jax.Array],
    added: list[jax.Array],
    *,
    plan: tuple[_Sum, ...],
    shared_steps: int,
    is_transposed: bool,
    tile_n: int,
    blocks: int,
) -> list[jax.Array]:
    """Runs the kernel. Compiled, so that equal calls in a program are lowered once."""
    rows, dtype = lhs[0].shape[0], lhs[0].dtype
    steps = sum(plan[0].steps) + shared_steps
    product = PersistentProduct(
        tile_n=tile_n,
        grid=(rows // TILE_M, plan[-1].end),
        steps=steps,
        is_transposed=is_transposed,
        rest=PARTS * len(added),
    )
    widths = [(part.end - part.first) * tile_n for part in plan]
    return product.kernel(
        functools.partial(
            _body,
            plan=plan,
            shared_steps=shared_steps,
            inputs=(len(lhs), len(rhs), len(added)),
            product=product,
        ),
        out_type=[jax.ShapeDtypeStruct((rows, width), dtype) for width in widths],
        blocks=blocks,
        name=KERNEL_NAME,
    )(*lhs, *rhs, *added)


def _plan(sums, is_transposed: bool, tile_n: int):
    """Returns the sums' static facts and the distinct operands."""
    lhs: list[jax.Array] = []
    rhs: list[jax.Array] = []
    plan, first = [], 0
    for terms in sums:
        operands, steps = [], []
        for left, right in terms:
            operands.append((_place(lhs, left), _place(rhs, right)))
            steps.append(_steps(left))
        columns = terms[0][1].shape[0 if is_transposed else 1]
        if columns % tile_n:
            raise UnsupportedOp(f"{columns} columns are no multiple of {tile_n}")
        end = first + columns // tile_n
        plan.append(_Sum(first, end, tuple(operands), tuple(steps)))
        first = end
    assert len({sum(s.steps) for s in plan}) == 1
    return tuple(plan), lhs, rhs


def _steps(left: jax.Array) -> int:
    return -(-left.shape[1] // TILE_K)


def _place(arrays: list[jax.Array], array: jax.Array) -> int:
    """Returns where `array` itself stands in the list, to which it is added once."""
    for index, known in enumerate(arrays):
        if known is array:
            return index
    arrays.append(array)
    return len(arrays) - 1


def _body(
    *refs,
    plan: tuple[_Sum, ...],
    shared_steps: int,
    inputs: tuple[int, int, int],
    product: PersistentProduct,
    **memory,
) -> None:
    ends = [0, *itertools.accumulate(inputs), len(refs)]
    lhs, rhs, added, outs = (refs[i:j] for i, j in itertools.pairwise(ends))
    block = ProductBlock(product=product, **memory)
    tile_n = product.tile_n

    def load(m, n, step):
        for part in plan:

            @_when_in(part, n, plan)
            def _(part=part):
                first = step
                for (left, right), count in zip(part.operands, part.steps, strict=True):
                    block.stream(lhs[left], rhs[right], m, n - part.first, first, count)
                    first += count

        if shared_steps:
            first = step + product.steps - shared_steps
            block.stream(lhs[-1], rhs[-1], m, n, first, shared_steps)
        for source in added:
            for part in range(PARTS):
                block.stream_part(source, m, n, part, step + product.steps + part)

    def epilogue(m, n, step):
        return functools.partial(store, m, n, step)

    def store(m, n, step, values):
        row = m * TILE_M
        column = n * tile_n + lax.axis_index("warpgroup") * block.columns
        pieces = sums(step, values) if added else whole(values)
        for index, (i, j, piece) in enumerate(pieces):
            piece_smem = block.placed(index, piece)
            copy(piece_smem, n, row + i, column + j)

    def whole(values):
        values = values.astype(outs[0].dtype)
        for i in range(0, TILE_M, PIECE):
            for j in range(0, block.columns, PIECE):
                yield i, j, values[i : i + PIECE, j : j + PIECE]

    def sums(step, values):
        for part in range(PARTS):
            for i, j, other in block.pieces(part, step + part):
                own = values[i : i + PIECE, j : j + PIECE]
                yield i, j, own + other.astype(jnp.float32)

    def copy(piece_smem, n, row, column):
        for part, out in zip(plan, outs, strict=True):

            @_when_in(part, n, plan)
            def _(part=part, out=out):
                first_column = column - part.first * tile_n
                at = (pl.ds(row, PIECE), pl.ds(first_column, PIECE))
                plgpu.copy_smem_to_gmem(piece_smem, out.at[at])

    block.run(load, epilogue)


def _when_in(part: _Sum, n, plan: tuple[_Sum, ...]):
    """Returns `pl.when` of a tile of this output; with one output there is no if."""
    if len(plan) == 1:
        return lambda run: run()
    return pl.when((n >= part.first) & (n < part.end))
