"""Times programs on the device: kernels beside XLA, bytes beside the copy rate."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from .numerics import relative_error
from .program import Program

COPY_BYTES_PER_SECOND = 4.3e12
"""The copy rate measured on an H200."""

Timer = Literal["cupti", "wall"]

_ITERATIONS = {"cupti": 20, "wall": 100}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One program: the kernel and what it must beat, in the same process."""

    program: str
    ms: float
    gigabytes_per_second: float
    share_of_copy_rate: float
    relative_error: float
    baseline: str
    baseline_ms: float
    baseline_relative_error: float
    speedup: float


def measure(program: Program, timer: Timer) -> Result:
    """Returns the times and errors of `program` on the default device.

    The errors are against the baseline on the same arguments in float32.
    """
    arguments = jax.jit(program.arguments)()
    expected = _run(program, program.baseline)(*jax.tree.map(_in_float32, arguments))
    timed = {}
    for name in ("mosaic_gpu", program.baseline):
        run = _run(program, name)
        error = largest_error(run(*arguments), expected)
        timed[name] = (seconds(run, arguments, timer), error)
    (kernel, error), (baseline, baseline_error) = timed.values()
    rate = program.bytes_moved / kernel
    return Result(
        program=program.name,
        ms=kernel * 1e3,
        gigabytes_per_second=rate / 1e9,
        share_of_copy_rate=rate / COPY_BYTES_PER_SECOND,
        relative_error=error,
        baseline=program.baseline,
        baseline_ms=baseline * 1e3,
        baseline_relative_error=baseline_error,
        speedup=baseline / kernel,
    )


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...], timer: Timer) -> float:
    """Returns how long one call keeps the device busy.

    Args:
      run: A jitted function; it has run before.
      arguments: Of each call; larger than the L2 cache, or the time is the cache's.
      timer: "cupti" gives the median of the summed kernel times; "wall" the mean of
        calls enqueued one after another, so that gaps between kernels count.
    """
    iterations = _ITERATIONS[timer]
    if timer == "wall":
        started = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(iterations)])
        return (time.perf_counter() - started) / iterations
    _, milliseconds = profiler.measure(run, iterations=iterations)(*arguments)
    if milliseconds is None:
        raise RuntimeError("CUPTI saw no kernel: use the wall timer")
    return statistics.median(milliseconds) / 1e3


def largest_error(actual: Any, expected: Any) -> float:
    """Returns the largest relative error among the leaves."""
    errors = jax.tree.map(relative_error, actual, expected)
    return max(jax.tree.leaves(errors), default=math.nan)


def _run(program: Program, implementation: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(program.run, implementation=implementation))


def _in_float32(leaf: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float32) if is_float else leaf
