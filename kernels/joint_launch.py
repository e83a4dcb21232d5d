"""Independent pieces of work as blocks of one launch on Hopper.

A launch of its own costs a small piece two microseconds, whatever little it does.
Blocks are warpgroups of 128 threads without shared memory.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
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
        results. Hashed by value, so that equal work is lowered once.
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

            @pl.when((block >= first) & (block < end))
            def _(work=work, own=own, first=first):
                work.run(block - first, *own)

    results = iter(
        plgpu.kernel(
            body,
            out_type=[result for work in works for result in work.results],
            grid=(ends[-1],),
            grid_names=("block",),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(),
        )(*operands)
    )
    return [[*itertools.islice(results, len(work.results))] for work in works]
