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
from kernels.ring import Ring

WARPGROUP_ROWS = 64
"""Rows of one `wgmma`, and so of what a warpgroup holds of a block."""

GROUPS = 2
"""Warpgroups of a thread block that compute; one more loads."""

BLOCK_Q = GROUPS * WARPGROUP_ROWS
"""Queries of a block of the forward and dq kernels."""

STAGES = 2
"""Buffers of keys and of values in these."""

HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Blocks of the forward, dq and dk/dv kernels.

    A block of queries (forward, dq) or keys (dkv) belongs to one thread block; the
    blocks of the other kind stream past it.

    Attributes:
      is_persistent: A multiprocessor runs one thread block of the forward kernel, and
        one of the dkv kernel, which takes several blocks.
      forward_k: Keys a step of the forward kernel.
      dq_k: Keys a step of the dq kernel.
      dkv_q: Queries a step of the dkv kernel.
      dkv_k: Keys of a block of the dkv kernel: 64 a warpgroup; or 64, and the two
        warpgroups take half of the features each.
      dkv_stages: Buffers of queries and of the output's gradient of the dkv kernel.
      keeps_dscores: Gradients of scores may go from dkv to dq by way of memory: blocks
        of 64 queries and 128 keys, and measured to be faster, of heads of 64 for packed
        rows alone.
    """

    is_persistent: bool = True
    forward_k: int = 128
    dq_k: int = 64
    dkv_q: int = 64
    dkv_k: int = 128
    dkv_stages: int = 2
    keeps_dscores: bool = False

    @property
    def buffers(self) -> int:
        """Blocks of a thread block's own that shared memory holds."""
        return 2 if self.is_persistent else 1

    @property
    def tokens(self) -> int:
        """Rows must be a multiple of this."""
        return math.lcm(BLOCK_Q, self.forward_k, self.dq_k, self.dkv_q, self.dkv_k)


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
            forward_k=64,
            dq_k=32,
            dkv_q=32,
            dkv_k=64,
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
