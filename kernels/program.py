"""An op at a real shape, as the compile check, the benchmark and the tuner run it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .choice import Case


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function with the arguments it is run on.

    Attributes:
      name: Op and case, for tables.
      run: Called as `run(*arguments, implementation=name)`; may be jitted.
      arguments: Makes the arguments; may be evaluated for its shapes alone.
      bytes_moved: What the algorithm must read and write, each array once.
      flops: What the algorithm must compute in matrix products.
      kernels: Names of the Mosaic GPU kernels that "mosaic_gpu" must launch; empty
        where the op has none.
      implementations: Those that are timed; the last is what the others are held to.
      decides: The op and case, as in `choice.fastest_first`, whose default follows
        from the times; those of all programs with the same choice are added up.
      rival: A program that does the same work in a way not open to this one, such as
        a product of weights that need no unpacking; None where nothing is held to one.
    """

    name: str
    run: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    bytes_moved: int
    flops: int = 0
    kernels: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ("mosaic_gpu", "xla")
    decides: tuple[str, Case] | None = None
    rival: "Program | None" = None

    @property
    def baseline(self) -> str:
        """The implementation that kernels must beat."""
        return self.implementations[-1]


def moved_bytes(run: Callable[..., Any], arguments: Callable[[], Any]) -> int:
    """Returns the bytes of the arguments and of what "xla" makes of them."""
    shapes = jax.eval_shape(arguments)
    results = jax.eval_shape(functools.partial(run, implementation="xla"), *shapes)
    return nbytes((shapes, results))


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
