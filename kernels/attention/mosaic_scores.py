"""Blocks of scores in registers: what the passes of attention on Hopper share."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_tiles import WARPGROUP_ROWS

LOG2_E = math.log2(math.e)


def is_seen(shape: tuple[int, int], start, first, end, *, axis: int):
    """Returns which keys of a block each query sees, as a block of booleans.

    Args:
      shape: Of the block.
      start: Its first key.
      first: The first key that each query sees.
      end: The key after the last one.
      axis: Of the block that the queries lie along.
    """
    layout = plgpu.Layout.WGMMA
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=layout) + start
    first, end = (along(x, shape, axis) for x in (first, end))
    return (key >= first) & (key < end)


def along(x, shape: tuple[int, ...], axis: int):
    """Spreads one number a query, which lie along `axis`, over a block of scores."""
    return lax.broadcast_in_dim(x, shape, [axis])


def weights_of(scores, lse, axis: int, scale: float, softcap: float | None):
    """Returns the weights, and the slope of the soft cap if there is one.

    Args:
      scores: Products of queries and keys.
      lse: Log-sum-exp of each query, in powers of two.
      axis: Of `scores` that the queries lie along.
      scale: Of the scores.
      softcap: Bound of the scores, or None.
    """
    factor, slope = scale * LOG2_E, None
    if softcap is not None:
        scores = jnp.tanh(scores * (scale / softcap))
        factor, slope = softcap * LOG2_E, 1 - scores * scores
    return jnp.exp2(scores * factor - along(lse, scores.shape, axis)), slope


def zeros(columns: int):
    """Returns float32 zeros of a warpgroup's rows, in registers."""
    zeros = jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
