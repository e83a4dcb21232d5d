"""A kernel at a real shape, as the compile check and the benchmark run it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function with the arguments it is run on.

    Attributes:
      name: Op and case, for tables.
      kernels: Names of the Mosaic GPU kernels that "mosaic_gpu" must launch.
      run: Called as `run(*arguments, implementation=name)`; may be jitted.
      arguments: Makes the arguments; may be evaluated for its shapes alone.
      bytes_moved: What the algorithm must read and write, each array once.
      baseline: Name of the implementation that the kernels must beat.
    """

    name: str
    kernels: tuple[str, ...]
    run: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    bytes_moved: int
    baseline: str = "xla"


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays or shapes in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
