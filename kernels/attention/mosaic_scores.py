"""Blocks of scores in registers: what the passes of attention on Hopper share."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = math.log2(math.e)


def is_seen(shape: tuple[int, int], first, end, *, axis: int):
    """Returns which keys of a block each query sees, as a block of booleans.

    Args:
      shape: Of the block.
      first: The first key that each query sees, counted from that of the block.
      end: The key after the last one, counted likewise.
      axis: Of the block that the queries lie along.
    """
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=plgpu.Layout.WGMMA)
    first, end = (along(x, shape, axis) for x in (first, end))
    return (key >= first) & (key < end)


def along(x, shape: tuple[int, ...], axis: int):
    """Spreads one number a query, which lie along `axis`, over a block of scores."""
    return lax.broadcast_in_dim(x, shape, [axis])
