"""What the Hopper kernels know of rows: it depends on documents and windows alone.

So a model makes it once a step, for all layers, heads and passes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from .mosaic_gpu_dscores import key_ranges
from .mosaic_tiles import TileConfig
from .spans import Spans, key_blocks, query_blocks


class Visits(NamedTuple):
    """Which keys each query sees, and which blocks each block therefore visits.

    The ranges of blocks are those of `spans.key_blocks` and `spans.query_blocks`.

    Attributes:
      spans: Of whole blocks of queries.
      pairs: First key and end of each span side by side, by blocks of queries that the
        dkv kernel streams.
      forward: Ranges of the blocks of queries in the forward kernel.
      dq: The same in the dq kernel.
      dkv: Ranges of the blocks of keys.
      dscores: Ranges of the blocks of queries in the kernel that takes gradients of
        scores from memory; None where none does.
    """

    spans: Spans
    pairs: Int32[Array, "B I 2 queries"]
    forward: Int32[Array, "B I 4"]
    dq: Int32[Array, "B I 4"]
    dkv: Int32[Array, "B J 4"]
    dscores: Int32[Array, "B I 3 2"] | None


def visits_of(spans: Spans, k_tokens: int, tiles: TileConfig) -> Visits:
    """Returns the visits of rows of so many keys, which may be no whole blocks."""
    padding = ((0, 0), (0, -spans.first.shape[1] % tiles.tokens))
    spans = Spans(*(jnp.pad(x, padding) for x in spans))
    k_tokens += -k_tokens % tiles.tokens
    return Visits(
        spans,
        paired(*spans, tiles.dkv_q),
        key_blocks(spans, tiles.block_q, tiles.forward_k),
        key_blocks(spans, tiles.block_q, tiles.dq_k),
        query_blocks(spans, k_tokens, tiles.dkv_q, tiles.dkv_k),
        key_ranges(spans) if tiles.keeps_dscores else None,
    )


def paired(
    x: Shaped[Array, "*B T"], y: Shaped[Array, "*B T"], block: int
) -> Shaped[Array, "*B I 2 block"]:
    """Returns both in one array of blocks: one copy brings both of a block."""
    shape = (*x.shape[:-1], -1, block)
    return jnp.stack([x.reshape(shape), y.reshape(shape)], axis=-2)
