"""Spans of keys and ranges of blocks, against loops over every query."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention.mask import visible
from kernels.attention.spans import (
    Spans,
    causal_spans,
    in_parts,
    key_blocks,
    query_blocks,
    visited_keys,
)
from kernels.attention.visits import tasks

TOKENS = 24
SEGMENTS = {
    "whole": None,
    "packed": [1] * 5 + [2] * 9 + [3] * 10,
    "padded": [1] * 7 + [2] * 6 + [0] * 11,
    "padded_inside": [1] * 7 + [0] * 4 + [2] * 13,
}


def spans_and_mask(segments, window) -> tuple[Spans, np.ndarray]:
    ids = None if segments is None else jnp.asarray([segments], jnp.int32)
    index = jnp.arange(TOKENS, dtype=jnp.int32)
    mask = visible(
        index[None], index, q_segment_ids=ids, segment_ids=ids, window=window
    )
    spans = causal_spans(1, TOKENS, TOKENS, segment_ids=ids, window=window)
    return spans, np.asarray(mask[0])


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("window", [None, 1, 6, jnp.int32(6)])
def test_spans_and_blocks_are_those_of_the_mask(segments, window):
    spans, mask = spans_and_mask(segments, window)
    keys = np.arange(TOKENS)
    first, end = (np.asarray(x[0])[:, None] for x in spans)
    assert np.array_equal((keys >= first) & (keys < end), mask)
    tiles = mask.reshape(6, 4, 3, 8).swapaxes(1, 2)
    check_ranges(np.asarray(key_blocks(spans, 4, 8))[0], tiles, is_never_empty=True)
    for (begin, end), row in zip(visited_keys(spans, 4, 8)[0], tiles, strict=True):
        seen = np.flatnonzero(row.any(axis=(1, 2)))
        assert (begin, end) == (seen[0], seen[-1] + 1) if seen.size else begin == end
    tiles = tiles.swapaxes(0, 1)
    check_ranges(np.asarray(query_blocks(spans, TOKENS, 4, 8))[0], tiles)


def check_ranges(ranges, tiles, *, is_never_empty=False):
    """Each range covers what is seen, no more, and its full part needs no mask."""
    for (begin, full_begin, full_end, stop), row in zip(ranges, tiles, strict=True):
        seen = np.flatnonzero(row.any(axis=(1, 2)))
        full = np.flatnonzero(row.all(axis=(1, 2)))
        assert begin <= full_begin <= full_end <= stop
        assert set(range(full_begin, full_end)) == set(full)
        if seen.size:
            assert (begin, stop) == (seen[0], seen[-1] + 1)
        else:
            assert stop - begin == is_never_empty


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("window", [None, 6])
def test_ranges_of_parts_are_counted_from_their_block(segments, window):
    spans, _ = spans_and_mask(segments, window)
    ranges = query_blocks(spans, TOKENS, 4, 4)
    blocks = np.asarray(in_parts(ranges, 2))[0]
    for (begin, *parts, end), pair in zip(
        blocks, np.asarray(ranges).reshape(3, 2, 4), strict=True
    ):
        seen = [part for part in pair if part[3] > part[0]]
        assert begin == min((part[0] for part in seen), default=0)
        assert end == max((part[3] for part in seen), default=0)
        for got, part in zip(np.reshape(parts, (2, 4)), pair, strict=True):
            assert np.array_equal(got, part - begin if part[3] > part[0] else [0] * 4)


def test_tasks_are_all_blocks_longest_first():
    ranges = jnp.asarray(
        [[[3, 9, 4], [0, 9, 0], [1, 9, 6]], [[2, 9, 7], [0, 9, 5], [0, 9, 1]]]
    )
    lines = np.asarray(tasks(ranges.astype(jnp.int32))).tolist()
    assert lines == [
        [0, 2, 1, 9, 6],
        [1, 0, 2, 9, 7],
        [1, 1, 0, 9, 5],
        [0, 0, 3, 9, 4],
        [1, 2, 0, 9, 1],
        [0, 1, 0, 9, 0],
    ]


def test_chunks_see_their_part_of_the_row():
    whole = causal_spans(1, TOKENS, TOKENS)
    part = causal_spans(1, 8, 8, q_offset=16, k_offset=8)
    for ends, chunk in zip(whole, part, strict=True):
        assert np.array_equal(np.clip(np.asarray(ends[0, 16:]) - 8, 0, 8), chunk[0])
