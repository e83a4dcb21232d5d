"""Row lengths: few, long enough, and those that pad the least."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjax.data.row_lengths import padded_lengths


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    shapes=st.integers(1, 4),
    room=st.integers(0, 9),
)
def test_no_choice_of_lengths_pads_less(tokens, shapes, room):
    limit = max(tokens) + room
    tokens = np.array(tokens, np.int64)
    padded = padded_lengths(tokens, shapes=shapes, multiple=8, limit=limit)
    assert (padded >= tokens).all()
    assert len(set(padded)) <= shapes
    even = limit + limit % 2
    sizes = np.unique(np.minimum(-(-tokens // 8) * 8, even))
    assert set(padded) <= set(sizes)
    least = min(
        sum(min(size for size in chosen if size >= n) for n in tokens.tolist())
        for count in range(shapes)
        for others in itertools.combinations(sizes[:-1].tolist(), count)
        for chosen in [(*others, int(sizes[-1]))]
    )
    assert padded.sum() == least


def test_one_length_is_the_longest():
    tokens = np.array([3, 70, 5], np.int64)
    one = padded_lengths(tokens, shapes=1, multiple=64, limit=200)
    assert one.tolist() == [128, 128, 128]
    two = padded_lengths(tokens, shapes=2, multiple=64, limit=99)
    assert two.tolist() == [64, 100, 64]
