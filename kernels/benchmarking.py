"""Times programs on the device, beside XLA and beside what the device can do."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from .dispatch import UnsupportedOp
from .numerics import relative_error
from .program import Program

Timer = Literal["cupti", "wall"]
Call = Callable[[], Any]

_ITERATIONS = {"cupti": 20, "wall": 100}
_LEAST_ITERATIONS = 3
_ENOUGH_SECONDS = 0.5
_ROUNDS, _TURN_SECONDS, _MOST_CALLS = 3, 0.3, 200


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reaches on the simplest work of each kind."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def seconds(self, program: Program) -> float:
        """Returns the shortest time that `program` could take."""
        return max(
            program.bytes_moved / self.copy_bytes_per_second,
            program.flops / self.matmul_flops_per_second,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One implementation of a program.

    Attributes:
      program: Its name.
      implementation: Which one.
      ms: Time of a call.
      gigabytes_per_second: By the bytes that the algorithm must move.
      teraflops_per_second: By the products that the algorithm must compute.
      share_of_ceiling: The shortest time that the ceilings allow over `ms`.
      speedup: The baseline's time over `ms`, in the same process.
      relative_error: The largest among the results, against the baseline on the same
        arguments in float32.
    """

    program: str
    implementation: str
    ms: float
    gigabytes_per_second: float
    teraflops_per_second: float
    share_of_ceiling: float
    speedup: float
    relative_error: float


def measure(program: Program, ceilings: Ceilings, timer: Timer) -> list[Result]:
    """Returns times and errors of the implementations that can run here."""
    arguments = jax.jit(program.arguments)()
    expected = run_of(program, program.baseline)(*jax.tree.map(_in_float32, arguments))
    runs = _able_runs(program, arguments)
    errors = {n: largest_error(run(*arguments), expected) for n, run in runs.items()}
    times = {name: seconds(run, arguments, timer) for name, run in runs.items()}
    return [
        Result(
            program=program.name,
            implementation=name,
            ms=time * 1e3,
            gigabytes_per_second=program.bytes_moved / time / 1e9,
            teraflops_per_second=program.flops / time / 1e12,
            share_of_ceiling=ceilings.seconds(program) / time,
            speedup=times[program.baseline] / time,
            relative_error=errors[name],
        )
        for name, time in times.items()
    ]


def choices(programs: Iterable[Program], timer: Timer) -> Iterator[dict[str, Any]]:
    """Yields the times by which defaults are chosen, as `results.write_table` wants.

    The times of programs with the same choice are added up, so that a kernel may lose
    on the forward what it wins on the backward. An implementation that cannot run one
    of them has no time. With "cupti" the implementations take turns, each without a
    pause, so that all meet the clock that the power limit leaves a training step.
    """
    groups: dict[str, list[Program]] = {}
    for program in programs:
        if program.decides is not None:
            groups.setdefault(str(program.decides), []).append(program)
    for group in groups.values():
        times = [_times(program, timer) for program in group]
        able = set.intersection(*(set(found) for found in times))
        total = {name: sum(found[name] for found in times) for name in able}
        op, case = group[0].decides or ("", {})
        fastest_first = sorted(total.items(), key=lambda pair: pair[1])
        ms = {name: round(1e3 * seconds, 5) for name, seconds in fastest_first}
        yield {"op": op, "case": dict(case), "ms": ms}


def ceilings(timer: Timer) -> Ceilings:
    """Measures copies of large arrays and a product of bf16 matrices of 8192 x 8192."""
    key = jax.random.key(0)
    rates = []
    for size in (2**26, 2**27, 2**28, 2**29):
        x = jax.random.normal(key, (size,), jnp.bfloat16)
        rates.append(2 * x.nbytes / seconds(_compiled(jnp.negative, x), (x,), timer))
    a = jax.random.normal(key, (8192, 8192), jnp.bfloat16)
    product = seconds(_compiled(jnp.dot, a, a), (a, a), timer)
    return Ceilings(
        copy_bytes_per_second=max(rates), matmul_flops_per_second=2 * 8192**3 / product
    )


def seconds(run: Callable[..., Any], arguments: tuple[Any, ...], timer: Timer) -> float:
    """Returns how long one call keeps the device busy.

    Args:
      run: A jitted function; it has run before.
      arguments: Of each call; larger than the L2 cache, or the time is the cache's.
      timer: "cupti" gives the median of the summed kernel times; "wall" the mean of
        calls enqueued one after another, so that gaps between kernels count. Slow
        calls are timed less often.
    """
    jax.block_until_ready(run(*arguments))
    once = _wall_seconds(run, arguments, 1)
    iterations = max(int(_ENOUGH_SECONDS / once), _LEAST_ITERATIONS)
    iterations = min(iterations, _ITERATIONS[timer])
    if timer == "wall":
        return _wall_seconds(run, arguments, iterations)
    return statistics.median(
        kernel_seconds(functools.partial(run, *arguments), iterations)
    )


def _wall_seconds(
    run: Callable[..., Any], arguments: tuple[Any, ...], iterations: int
) -> float:
    started = time.perf_counter()
    jax.block_until_ready([run(*arguments) for _ in range(iterations)])
    return (time.perf_counter() - started) / iterations


def kernel_seconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Returns the sum of the kernel times of each of so many calls in a row.

    As JAX's `profiler.measure`, which refuses calls whose kernels come in another
    order each time; XLA runs small ones side by side.
    """
    private: Any = profiler
    cupti = private.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        result = None
        for _ in range(calls):
            result = call()  # the one before may be freed
        jax.block_until_ready(result)
    finally:
        launches = cupti._cupti_get_timings(True)
    each, rest = divmod(len(launches), calls)
    if rest or not each:
        raise RuntimeError(
            f"CUPTI saw {len(launches)} kernels in {calls} calls: use the wall timer"
        )
    times = [milliseconds / 1e3 for _, milliseconds in launches]
    return [sum(times[i : i + each]) for i in range(0, len(times), each)]


def in_turn(
    calls: Sequence[Call], counts: Sequence[int], *, pause_seconds: float = 0.0
) -> list[float]:
    """Returns the median milliseconds of each, called so many times in turn.

    Args:
      calls: Of programs that have run before.
      counts: How often each is called without a pause, in each of several rounds.
      pause_seconds: Before each of them, which is called once more before it.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, count, own in zip(calls, counts, times, strict=True):
            if pause_seconds:
                jax.block_until_ready(call())
                time.sleep(pause_seconds)
            own += kernel_seconds(call, count)
    return [1e3 * statistics.median(own) for own in times]


def largest_error(actual: Any, expected: Any) -> float:
    """Returns the largest relative error among the leaves."""
    errors = jax.tree.map(relative_error, actual, expected)
    return max(jax.tree.leaves(errors), default=math.nan)


def run_of(program: Program, implementation: str) -> Callable[..., Any]:
    """Returns the jitted program with its implementation named."""
    return jax.jit(functools.partial(program.run, implementation=implementation))


def _able_runs(
    program: Program, arguments: tuple[Any, ...]
) -> dict[str, Callable[..., Any]]:
    """Returns `run_of` each implementation that can run here; all have run once."""
    able = {}
    for name in program.implementations:
        run = run_of(program, name)
        try:
            jax.block_until_ready(run(*arguments))
        except UnsupportedOp:
            continue
        able[name] = run
    return able


def _times(program: Program, timer: Timer) -> dict[str, float]:
    """Returns implementation -> seconds of those that can run here."""
    arguments = jax.jit(program.arguments)()
    runs = _able_runs(program, arguments)
    if timer == "wall":
        return {name: seconds(run, arguments, timer) for name, run in runs.items()}
    once = [_wall_seconds(run, arguments, 1) for run in runs.values()]
    counts = [max(1, min(int(_TURN_SECONDS / each), _MOST_CALLS)) for each in once]
    calls = [functools.partial(run, *arguments) for run in runs.values()]
    times = in_turn(calls, counts)
    return {name: each / 1e3 for name, each in zip(runs, times, strict=True)}


def _compiled(function: Callable[..., Any], *arguments: jax.Array) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _in_float32(leaf: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float32) if is_float else leaf
