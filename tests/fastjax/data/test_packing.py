"""Packing: every document once, bounds kept, rows nearly full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjax.data import packing
from fastjax.data.packing import documents_per_row


def chats(count: int, sigma: float) -> np.ndarray:
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(127) - sigma**2 / 2, sigma, count)
    return np.clip(lengths, 2, 2000).astype(int)


def packed_rows(lengths, capacity: int, *, most: int | None = None):
    rows = packing.packed_rows(np.array(lengths), capacity, most=most)
    listed = list(rows)
    assert rows.counts.tolist() == [len(row) for row in listed]
    assert rows.sums(np.array(lengths)).tolist() == [
        sum(lengths[i] for i in row) for row in listed
    ]
    return listed


def fill(rows, lengths, capacity: int) -> float:
    return sum(lengths) / (capacity * len(rows))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    room=st.integers(0, 100),
    most=st.none() | st.integers(1, 12),
)
def test_every_document_is_placed_once(lengths, room, most):
    capacity = max(lengths) + room
    rows = packed_rows(lengths, capacity, most=most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    assert rows == packed_rows(lengths, capacity, most=most)
    if most is None:
        # Of any two rows, one is more than half full.
        assert sum(2 * size <= capacity for size in filled) <= 1
    else:
        assert max(map(len, rows)) <= most


def test_long_documents_take_the_best_fit():
    assert packed_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert packed_rows([2, 9, 8, 2], 10) == [[1], [2, 0], [3]]


def test_short_documents_are_spread():
    assert packed_rows([90, 80, *[5] * 4], 100) == [[0, 4], [1, 2, 3, 5]]
    assert packed_rows([90, 80, *[5] * 4], 100, most=3) == [[0, 4, 5], [1, 2, 3]]
    assert packed_rows([5] * 6, 100, most=4) == [[0, 1, 2, 3], [4, 5]]


def test_wrong_lengths_and_bounds():
    for wrong in ([0], [11]):
        with pytest.raises(ValueError, match="capacity"):
            packed_rows(wrong, 10)
    with pytest.raises(ValueError, match="most=0"):
        packed_rows([1], 10, most=0)


@pytest.mark.parametrize("sigma", [0.8, 1.2, 1.8])
@pytest.mark.parametrize("capacity", [2000, 4096])
def test_bounded_rows_are_nearly_full(sigma, capacity):
    lengths = chats(20_000, sigma)
    most = documents_per_row(lengths, capacity)
    mean = capacity * len(lengths) / sum(lengths)
    assert 2 * mean <= most < 4 * (mean + 1)
    assert most.bit_count() == 1
    rows = packed_rows(lengths, capacity, most=most)
    assert max(map(len, rows)) <= most
    assert fill(rows, lengths, capacity) > 0.99


def test_few_documents_may_share_a_row():
    assert documents_per_row(np.array([100, 100]), 100) == 8


def test_packing_is_fast():
    lengths = np.random.default_rng(0).integers(1, 4096, 100_000)
    most = documents_per_row(lengths, 4096)
    rows = packing.packed_rows(lengths, 4096, most=most)
    assert fill(rows, lengths, 4096) > 0.99
