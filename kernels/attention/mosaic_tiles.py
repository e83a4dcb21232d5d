"""Blocks of the Hopper kernels: their sizes, who takes them, how they stream."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import wgmma
from kernels.dispatch import UnsupportedOp

WARPGROUP_ROWS = 64
"""Rows of one `wgmma`, and so of what a warpgroup holds of a block."""

HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Blocks of the forward, dq and dk/dv kernels.

    A block of queries (forward, dq) or keys (dkv) belongs to one thread block; the
    blocks of the other kind stream past it through `stages` buffers.

    Attributes:
      groups: Compute warpgroups of the forward and dq kernels, 64 queries each.
      is_persistent: A multiprocessor runs one thread block of the forward kernel, and
        one of the dkv kernel, which takes several blocks.
      q_buffers: Blocks of queries in shared memory, in the forward kernel.
      forward_k: Keys a step of the forward kernel.
      dq_k: Keys a step of the dq kernel.
      dkv_q: Queries a step of the dkv kernel.
      dkv_k: Keys of a block of the dkv kernel: 64 a warpgroup; or 64, and the two
        warpgroups take half of the features each.
      stages: Buffers of keys and of values of the forward kernel.
      dq_stages: Those of the dq kernel.
      dkv_buffers: Blocks of keys and values in shared memory, in the dkv kernel.
      dkv_stages: Buffers of queries and of the output's gradient of the dkv kernel.
      keeps_dscores: Gradients of scores may go from dkv to dq by way of memory: blocks
        of 64 queries and 128 keys, and measured to be faster, of heads of 64 for packed
        rows alone.
    """

    groups: int = 2
    is_persistent: bool = True
    q_buffers: int = 2
    forward_k: int = 128
    dq_k: int = 64
    dkv_q: int = 64
    dkv_k: int = 128
    stages: int = 2
    dq_stages: int = 2
    dkv_buffers: int = 2
    dkv_stages: int = 2
    keeps_dscores: bool = False

    @property
    def block_q(self) -> int:
        """Queries of a block."""
        return self.groups * WARPGROUP_ROWS

    @property
    def tokens(self) -> int:
        """Rows must be a multiple of this."""
        return math.lcm(self.block_q, self.forward_k, self.dq_k, self.dkv_q, self.dkv_k)


def tile_config(head_size: int, *, has_softcap: bool) -> TileConfig:
    """Returns the blocks for a head size, or raises `UnsupportedOp`.

    Registers decide. 256 features leave few for a step, and none for a loop over
    blocks; the slope of a soft cap takes what gradients of 128 features
    leave, so that there each warpgroup of dkv holds half of the features.
    """
    if head_size not in HEAD_SIZES:
        raise UnsupportedOp(f"{head_size=} must be one of {HEAD_SIZES}")
    if head_size == 256:
        return TileConfig(
            is_persistent=False,
            q_buffers=1,
            forward_k=64,
            dq_k=32,
            dkv_q=32,
            dkv_k=64,
            dkv_buffers=1,
            dkv_stages=4,
        )
    if has_softcap and head_size > 96:
        return TileConfig(dkv_k=64)
    return TileConfig(
        dq_k=128 if head_size in (64, 128) else 64,
        keeps_dscores=head_size in (64, 96, 128),
    )


def operand(shape: tuple[int, ...], dtype: jnp.dtype, *, step: int = 64) -> Any:
    """Returns shared memory for a `wgmma` operand whose last axis is the head.

    Args:
      shape: The last two axes are rows and features.
      dtype: Of 16 bits.
      step: Rows of the blocks that stream by. Products over rows want no wider
        swizzle, and all operands of a product the same one.
    """
    transforms = wgmma.swizzled(math.gcd(shape[-1], step), dtype)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator(columns: int) -> Any:
    """Returns the registers of a warpgroup for 64 rows of a float32 product."""
    return wgmma.accumulator(WARPGROUP_ROWS, columns)


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


class Share(NamedTuple):
    """The tasks of one thread block, those that visit most blocks first.

    Every head has each task of a list, which `visits.tasks` makes. They are dealt out
    to and fro, so that each thread block gets about as many steps. The heads of a task
    run side by side: one head after the other, thread blocks would get unlike shares.

    Attributes:
      position: Of the thread block.
      dealt: To so many thread blocks.
      heads: That have each task.
      gmem: The list.
    """

    position: Any
    dealt: int
    heads: int
    gmem: Any

    @property
    def total(self) -> Any:
        """How many tasks."""
        rounds, rest = divmod(self.gmem.shape[0] * self.heads, self.dealt)
        back = self.dealt - 1 - self.position
        last = self.position if rounds % 2 == 0 else back
        return jnp.where(last < rest, rounds + 1, rounds) if rest else rounds

    def take(self, number: Any) -> tuple[Any, list[Any]]:
        """Returns the head and the numbers of a task."""
        back = self.dealt - 1 - self.position
        offset = jnp.where(lax.rem(number, jnp.int32(2)) == 0, self.position, back)
        index, heads = number * self.dealt + offset, jnp.int32(self.heads)
        line, head = lax.div(index, heads), lax.rem(index, heads)
        return head, [self.gmem[line, i] for i in range(self.gmem.shape[1])]


class Visit(NamedTuple):
    """The blocks that a thread block visits, those that need no mask first.

    Then come the ones after those, then the ones before: two loops, not three.

    Attributes:
      steps: How many.
      full_steps: How many need no mask.
    """

    steps: Any
    full_steps: Any
    full_begin: Any
    stop: Any

    @classmethod
    def of(cls, begin: Any, full_begin: Any, full_end: Any, stop: Any) -> "Visit":
        """Takes the numbers of one of the ranges that `spans` makes."""
        return cls(stop - begin, full_end - full_begin, full_begin, stop)

    def block(self, step: Any) -> Any:
        """Returns which block a step visits."""
        block = self.full_begin + step
        return jnp.where(block < self.stop, block, block - self.steps)


def stream_keys(
    visit: Visit,
    place: tuple[Any, Any],
    block_k: int,
    streams: tuple[tuple[Any, Ring], ...],
    begun: Any = 0,
) -> Any:
    """Brings the blocks of keys that a visit wants; returns the steps begun by then.

    Args:
      visit: Of blocks of keys.
      place: The row, and the head of the keys.
      block_k: Keys of a block.
      streams: Arrays (B, S, K, H), and what each streams through.
      begun: Steps of earlier visits.
    """
    row, head = place

    def load(turn, _):
        keys = pl.ds(visit.block(turn) * block_k, block_k)
        for gmem, ring in streams:
            ring.fill(begun + turn, gmem.at[row, keys, head])

    lax.fori_loop(0, visit.steps, load, None)
    return begun + visit.steps
