"""Independent pieces of work as blocks of one launch on Hopper.

A launch of its own costs a small piece two microseconds, whatever little it does.
Blocks are warpgroups of 128 threads without shared memory. Layouts are named, not
inferred (`LoweringSemantics.Lane`): to infer them took two thirds of the time in which
a training step's launches are lowered, and made the same machine code.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands"],
    meta_fields=["results", "blocks", "run"],
)
@dataclass(frozen=True, kw_only=True)
class Work:
    """What some blocks of a launch do.

    Attributes:
      operands: Arrays that they read.
      results: Of what they write.
      blocks: How many they are.
      run: Called in each of them with its number and the references of operands and
        results. Names the layout of each array in registers, since none is inferred.
        Hashed by value, so that equal work is lowered once.
    """

    operands: tuple[jax.Array, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    blocks: int
    run: Callable[..., None]


@functools.partial(jax.jit, static_argnames=("name",))
def joint_launch(works: Sequence[Work], *, name: str) -> list[list[jax.Array]]:
    """Returns the results of each of `works`.

    Compiled, so that equal calls in a program are lowered once.

    Args:
      works: Their blocks start in this order.
      name: Of the kernel.
    """
    operands = [operand for work in works for operand in work.operands]
    ends = [0, *itertools.accumulate(work.blocks for work in works)]

    def body(*refs: Any) -> None:
        block, inputs = lax.axis_index("block"), iter(refs[: len(operands)])
        outputs = iter(refs[len(operands) :])
        for work, (first, end) in zip(works, itertools.pairwise(ends), strict=True):
            own = [
                *itertools.islice(inputs, len(work.operands)),
                *itertools.islice(outputs, len(work.results)),
            ]

            @functools.partial(run_between, block, first, end)
            def _(index, work=work, own=own):
                work.run(index, *own)

    results = iter(
        plgpu.kernel(
            body,
            out_type=[result for work in works for result in work.results],
            grid=(ends[-1],),
            grid_names=("block",),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
        )(*operands)
    )
    return [[*itertools.islice(results, len(work.results))] for work in works]


def run_between(block: Any, first: int, end: int, run: Callable[[Any], None]) -> None:
    """Runs a piece of work in the blocks from `first` to before `end`.

    Not by `pl.when`, which turns a truth value into a number, for which Mosaic starts
    ptxas each time, to ask for its version.

    Args:
      block: This one.
      first: The first of the work's.
      end: What follows its last.
      run: Called with the number of the block within the work.
    """
    is_own = (block >= first) & (block < end)
    number = lax.select(is_own, jnp.int32(1), jnp.int32(0))
    lax.switch(number, [lambda: None, lambda: run(block - first)])
