"""What the Hopper kernels know of rows: it depends on documents and windows alone.

So a model makes it once a step, for all layers, heads and passes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from .mosaic_gpu_dscores import key_ranges
from .mosaic_tiles import BLOCK_Q, WARPGROUP_ROWS, TileConfig
from .spans import Spans, in_parts, key_blocks, query_blocks


class Visits(NamedTuple):
    """Which keys each query sees, and which blocks each block therefore visits.

    The ranges of blocks are those of `spans.key_blocks` and `spans.query_blocks`; tasks
    are lines of a row, a block of it and what that visits.

    Attributes:
      spans: First key and end of each query, of whole blocks of them.
      forward: Tasks of the forward kernel: blocks of queries and their ranges.
      dq: Ranges of the blocks of queries in the dq kernel.
      dkv: Tasks of the dkv kernel: blocks of keys and, for each 64 of them, the ranges,
        counted from the first block of queries (`spans.in_parts`).
      dscores: Tasks of the kernel that takes gradients of scores from memory, with
        `mosaic_gpu_dscores.key_ranges`; None where none does.
    """

    spans: Int32[Array, "B 2 T"]
    forward: Int32[Array, "tasks numbers"]
    dq: Int32[Array, "B I 4"]
    dkv: Int32[Array, "tasks numbers"]
    dscores: Int32[Array, "tasks numbers"] | None


def visits_of(spans: Spans, k_tokens: int, tiles: TileConfig) -> Visits:
    """Returns the visits of rows of so many keys, which may be no whole blocks."""
    padding = ((0, 0), (0, -spans.first.shape[1] % tiles.tokens))
    spans = Spans(*(jnp.pad(x, padding) for x in spans))
    k_tokens += -k_tokens % tiles.tokens
    seen = query_blocks(spans, k_tokens, tiles.dkv_q, WARPGROUP_ROWS)
    return Visits(
        jnp.stack(spans, axis=1),
        tasks(key_blocks(spans, BLOCK_Q, tiles.forward_k)),
        key_blocks(spans, BLOCK_Q, tiles.dq_k),
        tasks(in_parts(seen, tiles.dkv_k // WARPGROUP_ROWS)),
        tasks(key_ranges(spans)) if tiles.keeps_dscores else None,
    )


def tasks(ranges: Int32[Array, "B I numbers"]) -> Int32[Array, "tasks all_numbers"]:
    """Returns (row, block, *ranges) of each block, those that visit most first.

    Args:
      ranges: Of the blocks; they begin with the first number, and end with the last.
    """
    rows, blocks, _ = ranges.shape
    place = jnp.indices((rows, blocks), jnp.int32).reshape(2, -1).T
    lines = jnp.concatenate([place, ranges.reshape(rows * blocks, -1)], axis=1)
    return lines[jnp.argsort(lines[:, 2] - lines[:, -1], stable=True)]
