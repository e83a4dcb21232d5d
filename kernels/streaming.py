"""A wide matrix streamed through shared memory: what kernels that memory bounds share.

One warpgroup of a block copies tiles into a ring, one or two work on them. The ring has
two to eight stages in up to 192 KiB, so that enough bytes are on their way.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.wgmma import swizzled

LINE = 64
"""Elements of 16 bits in a swizzled line."""

ROWS = 64
"""Rows of a tile: those of one wgmma instruction."""

_RING_BYTES = 192 * 1024
_LOADER_REGISTERS = 40

Tile = tuple[tuple[int, int], Callable[[Any], tuple[Any, Any]]]
"""A shape and its place, counted in tiles, at a step."""


def num_parts(tiles: int, steps: int, blocks: int) -> int:
    """Returns into how many parts the contracted axis is cut to fill the device."""
    wanted = max(1, round(blocks / tiles))
    return math.gcd(steps, 1 << (wanted.bit_length() - 1))


def parts_type(
    parts: int, shape: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """Returns what a launch writes of a product: the only part is the product."""
    return jax.ShapeDtypeStruct((parts, *shape), jnp.float32 if parts > 1 else dtype)


def sum_of_parts(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the product, its parts added in float32 in a fixed order."""
    return jnp.sum(parts, axis=0).astype(dtype) if len(parts) > 1 else parts[0]


def streamed(
    work: Callable[..., Any],
    context: Callable[[Callable[[Any], Any]], None],
    steps: int,
    *tiles: Tile,
    multipliers: int = 1,
    max_stages: int = 8,
) -> Callable[..., None]:
    """Returns a loop over the tiles of 16-bit operands, which it takes as references.

    Args:
      work: Takes the indices of a step, the tiles in shared memory and what is carried,
        which it returns. Where one warpgroup works, products may end in the next step.
      context: Run by those warpgroups; takes the loop, to call it with what is carried.
      steps: Of the loop.
      *tiles: Of each operand.
      multipliers: Warpgroups that work.
      max_stages: Tiles of so many steps at most are in shared memory at a time.
    """
    stage_bytes = sum(2 * math.prod(shape) for shape, _ in tiles)
    stages = max(2, min(max_stages, _RING_BYTES // stage_bytes))
    return plgpu.emit_pipeline_warp_specialized(
        work,
        grid=(steps,),
        memory_registers=_LOADER_REGISTERS,
        in_specs=[
            plgpu.BlockSpec(
                shape,
                index_map,
                transforms=swizzled(LINE, jnp.bfloat16),
                memory_space=plgpu.SMEM,
                delay_release=min(1, steps - 1) if multipliers == 1 else 0,
            )
            for shape, index_map in tiles
        ],
        wg_axis="warpgroup",
        num_compute_wgs=multipliers,
        max_concurrent_steps=stages,
        compute_context=context,
    )


def launch(
    name: str,
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    *operands: jax.Array,
    multipliers: int = 1,
    scratch_types: Sequence[Any] = (),
    approx_math: bool = False,
) -> Sequence[jax.Array]:
    """Runs a kernel on a grid of tiles ("row") and of parts of their steps ("part").

    Args:
      name: Of the kernel.
      body: Takes references of operands, results and scratch; calls `streamed` once.
      out_type: Results.
      grid: Sizes of both axes.
      *operands: Of the kernel.
      multipliers: Warpgroups beside the one that loads.
      scratch_types: As `plgpu.kernel` takes them.
      approx_math: Whether exponentials may be approximate.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("row", "part"),
        num_threads=multipliers + 1,
        scratch_types=scratch_types,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
    )(*operands)
