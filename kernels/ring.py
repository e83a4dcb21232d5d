"""Buffers in shared memory that blocks of a matrix stream through, in Mosaic GPU."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Ring(NamedTuple):
    """Buffers in shared memory that blocks stream through.

    Attributes:
      buffers: Arrays; the first axis is the stage.
      loaded: Barriers, one a stage, that each copy arrives at.
      free: Barriers, one a stage, that its readers arrive at.
    """

    buffers: tuple[Any, ...]
    loaded: Any
    free: Any

    def fill(self, step: Any, *sources: Any) -> None:
        """Starts copies, one for each buffer, once the stage's last use is over.

        Steps are counted from 0, over all blocks that the thread block works on.
        """
        at = self.claim(step)
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[at], self.loaded.at[at])

    def claim(self, step: Any) -> Any:
        """Returns the stage of a step, once its last use is over."""
        at = self._stage(step)
        is_reused = step >= self.free.shape[0]
        pl.when(is_reused)(lambda: plgpu.barrier_wait(self.free.at[at]))
        return at

    def drain(self, steps: Any) -> None:
        """Waits until what so many steps brought was read."""

        def wait(step, _):
            plgpu.barrier_wait(self.free.at[self._stage(step)])

        lax.fori_loop(jnp.maximum(steps - self.free.shape[0], 0), steps, wait, None)

    def _stage(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.free.shape[0]))
