"""Which keys a query sees, as one span of key indices; and which blocks that leaves.

Causality, a window, documents that are not interleaved, padding, and chunks of a longer
row all leave each query one span `first <= s < end`. Both ends grow along a row (apart
from queries that see nothing), so the key blocks that a block of queries touches are a
range, so are those that need no mask, and so is the reverse.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32


class Spans(NamedTuple):
    """Query t of row b sees the keys `first[b, t] <= s < end[b, t]`."""

    first: Int32[Array, "B T"]
    end: Int32[Array, "B T"]


def causal_spans(
    batch: int,
    q_tokens: int,
    k_tokens: int,
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    k_offset: int | Int[Array, ""] = 0,
) -> Spans:
    """Returns the spans of causal attention over rows, or over chunks of a row.

    Args:
      batch: Rows.
      q_tokens: Queries in a row.
      k_tokens: Keys in a row.
      segment_ids: Document of each key and of the query at the same place; the
        tokens of one document stand together. 0 is padding.
      window: Tokens seen, the query's own included.
      q_offset: Place of the first query in its row.
      k_offset: Place of the first key in its row.
    """
    place = jnp.arange(q_tokens, dtype=jnp.int32) + jnp.asarray(q_offset, jnp.int32)
    first = jnp.zeros((batch, q_tokens), jnp.int32)
    end = jnp.broadcast_to(place + 1, first.shape)
    if window is not None:
        first = jnp.maximum(first, end - jnp.asarray(window, jnp.int32))
    if segment_ids is not None:
        first = jnp.maximum(first, _document_starts(segment_ids))
        end = jnp.where(segment_ids > 0, end, 0)
    shift = jnp.asarray(k_offset, jnp.int32)
    first, end = (jnp.clip(x - shift, 0, k_tokens) for x in (first, end))
    return Spans(first, end)


def _document_starts(segment_ids: Int[Array, "B S"]) -> Int32[Array, "B S"]:
    """Returns the index at which the document of each token starts."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    changes = jnp.pad(changes, ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(changes, index, 0), axis=1)


def key_blocks(spans: Spans, block_q: int, block_k: int) -> Int32[Array, "B I 4"]:
    """Returns, for each block of queries, the ranges of key blocks to visit.

    The last axis is (begin, full_begin, full_end, end): blocks outside of begin .. end
    are not seen, those of full_begin .. full_end are seen by every query wholly. A
    block of queries that see nothing visits one key block, so that no range is empty.
    """
    by_any, by_all = _bounds(spans, block_q)
    begin, end = _key_blocks_of(by_any, block_k)
    stop = jnp.maximum(end, begin + 1)
    full_begin = jnp.clip(-(-by_all.first // block_k), begin, stop)
    full_end = jnp.clip(by_all.end // block_k, full_begin, stop)
    return jnp.stack([begin, full_begin, full_end, stop], axis=2)


def visited_keys(spans: Spans, block_q: int, block_k: int) -> Int32[Array, "B I 2"]:
    """Returns, for each block of queries, the key blocks that one of them sees.

    The last axis is (begin, end), the same number twice where no key is seen.
    """
    by_any, _ = _bounds(spans, block_q)
    return jnp.stack(_key_blocks_of(by_any, block_k), axis=2)


def query_blocks(
    spans: Spans, k_tokens: int, block_q: int, block_k: int
) -> Int32[Array, "B J 4"]:
    """Returns, for each block of keys, the ranges of query blocks to visit.

    As `key_blocks`, with queries and keys exchanged; ranges may be empty.
    """
    by_any, by_all = _bounds(spans, block_q)
    from_k = (jnp.arange(k_tokens // block_k, dtype=jnp.int32) * block_k)[None, :, None]
    to_k = from_k + block_k
    begin, stop = _range(
        (by_any.first[:, None] < to_k) & (by_any.end[:, None] > from_k)
    )
    full_begin, full_end = _first_run(
        (by_all.first[:, None] <= from_k) & (by_all.end[:, None] >= to_k)
    )
    full_begin = jnp.clip(full_begin, begin, stop)
    full_end = jnp.clip(full_end, full_begin, stop)
    return jnp.stack([begin, full_begin, full_end, stop], axis=2)


def in_parts(
    ranges: Int32[Array, "B parts numbers"], parts: int
) -> Int32[Array, "B I all_numbers"]:
    """Returns (begin, numbers of each part, end) of blocks of so many parts.

    Args:
      ranges: Of the parts; their first number is the begin, their last one the end.
        They are returned counted from the begin of their block; a part that sees
        nothing ends there.
      parts: Of a block.
    """
    ranges = ranges.reshape(ranges.shape[0], -1, parts, ranges.shape[2])
    sees = ranges[..., -1:] > ranges[..., :1]
    end = jnp.max(jnp.where(sees, ranges, 0), axis=(2, 3))[..., None]
    begin = jnp.min(jnp.where(sees, ranges, end[..., None]), axis=(2, 3))[..., None]
    ranges = jnp.where(sees, ranges - begin[..., None], 0)
    return jnp.concatenate([begin, ranges.reshape(*begin.shape[:2], -1), end], axis=2)


_LARGE = 2**30


def _bounds(spans: Spans, block_q: int) -> tuple[Spans, Spans]:
    """Returns what blocks of queries see, with one span a block.

    The first spans hold every key that any query of the block sees, and end at 0 where
    there is none; the second hold the keys that all of its queries see.
    """
    first, end = (x.reshape(x.shape[0], -1, block_q) for x in spans)
    sees = end > first
    lowest, highest = jnp.where(sees, first, _LARGE), jnp.where(sees, end, 0)
    by_any = Spans(jnp.min(lowest, axis=2), jnp.max(highest, axis=2))
    return by_any, Spans(jnp.max(first, axis=2), jnp.min(end, axis=2))


def _key_blocks_of(by_any: Spans, block_k: int) -> tuple[Array, Array]:
    """Returns the begin and the end of the key blocks that spans touch."""
    begin = jnp.where(by_any.end > 0, by_any.first // block_k, 0)
    return begin, -(-by_any.end // block_k)


def _range(is_member: Array) -> tuple[Array, Array]:
    """Returns the first and one past the last member of the last axis, or 0 and 0."""
    count = is_member.shape[-1]
    begin = jnp.argmax(is_member, axis=-1).astype(jnp.int32)
    last = jnp.argmax(is_member[..., ::-1], axis=-1).astype(jnp.int32)
    return begin, jnp.where(jnp.any(is_member, axis=-1), count - last, begin)


def _first_run(is_member: Array) -> tuple[Array, Array]:
    """Returns the bounds of the first run of members, or an empty range."""
    index = lax.broadcasted_iota(jnp.int32, is_member.shape, is_member.ndim - 1)
    begin = jnp.argmax(is_member, axis=-1).astype(jnp.int32)
    stops = jnp.where(is_member | (index < begin[..., None]), _LARGE, index)
    return begin, jnp.minimum(jnp.min(stops, axis=-1), is_member.shape[-1])
