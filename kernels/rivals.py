"""Times programs beside their rivals: in bursts, and at the device's power limit.

A GPU that multiplies without a pause lowers its clock after some tenths of a second, as
in a training step; a few calls after a pause run at a higher one. What wins in one
regime may lose in the other.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from .benchmarking import Call, in_turn
from .dispatch import UnsupportedOp
from .program import Program

_COMPILERS = 8  # threads
_BURST_CALLS = 8
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Rivalry:
    """The first implementation of a program that is able, beside the rival.

    Attributes:
      program: Its name.
      implementation: Which one.
      rival: The program that it is held to.
      ms: Median time of a call in bursts, after pauses.
      rival_ms: The rival's, in turn with it.
      share_of_rival: `rival_ms / ms`.
      sustained_ms: Median time of a call, called without a pause.
      rival_sustained_ms: The rival's, in turn with it.
      sustained_share_of_rival: `rival_sustained_ms / sustained_ms`.
      sustained_seconds: How long each was called at a time.
    """

    program: str
    implementation: str
    rival: str
    ms: float
    rival_ms: float
    share_of_rival: float
    sustained_ms: float
    rival_sustained_ms: float
    sustained_share_of_rival: float
    sustained_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    implementation: str
    arguments: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]

    def call(self) -> Call:
        return functools.partial(self.run, *self.arguments())


def compare(programs: Sequence[Program], seconds: float) -> Iterator[Rivalry]:
    """Yields what `Rivalry` says of each program that has a rival.

    Args:
      programs: Compiled at once, side by side.
      seconds: How long each is called without a pause, several times.
    """
    pairs = [(program, program.rival) for program in programs if program.rival]
    with ThreadPoolExecutor(_COMPILERS) as pool:
        compiled = list(pool.map(lambda pair: [*map(_compile, pair)], pairs))
    for (program, rival), both in zip(pairs, compiled, strict=True):
        calls = [one.call() for one in both]
        bursts = [_BURST_CALLS] * len(calls)
        ms, rival_ms = in_turn(calls, bursts, pause_seconds=_PAUSE_SECONDS)
        counts = [max(1, int(seconds * 1e3 / each)) for each in (ms, rival_ms)]
        sustained_ms, rival_sustained_ms = in_turn(calls, counts)
        yield Rivalry(
            program=program.name,
            implementation=both[0].implementation,
            rival=rival.name,
            ms=ms,
            rival_ms=rival_ms,
            share_of_rival=rival_ms / ms,
            sustained_ms=sustained_ms,
            rival_sustained_ms=rival_sustained_ms,
            sustained_share_of_rival=rival_sustained_ms / sustained_ms,
            sustained_seconds=seconds,
        )


def _compile(program: Program) -> _Compiled:
    """Compiles the first implementation that is able."""
    shapes = jax.eval_shape(program.arguments)
    arguments = jax.jit(program.arguments).lower().compile()
    for name in program.implementations:
        run = functools.partial(program.run, implementation=name)
        try:
            compiled = jax.jit(run).lower(*shapes).compile()
        except UnsupportedOp:
            continue
        return _Compiled(implementation=name, arguments=arguments, run=compiled)
    raise UnsupportedOp(f"no implementation of {program.name} can run here")
