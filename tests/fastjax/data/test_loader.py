"""Batches: shapes, shifted targets, isolation, order, and every row once an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjax.data import Document, Loader, packed_rows
from fastjax.errors import DataError

LENGTHS = [5, 3, 9, 2, 7, 4, 6, 3, 8, 2, 5]
ORDER_OF_SEED_42 = [4, 8, 10, 1, 9, 3, 6, 0, 7, 2, 5]


def documents(lengths=LENGTHS) -> list[Document]:
    """Makes documents whose tokens name the document and the place."""
    return [
        Document(np.arange(n, dtype=np.int32) + 100 * (i + 1), np.arange(n) % 3 != 0)
        for i, n in enumerate(lengths)
    ]


def make(**options) -> Loader:
    options = {"batch_size": 2, "accumulation": 2, "max_length": 12, **options}
    return Loader(documents(), **options)


def epoch(loader: Loader, number: int = 0) -> dict[str, np.ndarray]:
    first = number * len(loader)
    batches = [loader.batch(step) for step in range(first, first + len(loader))]
    return {
        name: np.concatenate([b[name].reshape(-1, loader.row_length) for b in batches])
        for name in batches[0]
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    room=st.integers(0, 20),
)
def test_packing_places_every_document_once(lengths, room):
    capacity = max(lengths) + room
    rows = packed_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    assert rows == packed_rows(lengths, capacity)
    # Of any two rows of a decreasing fit, at most one is half empty.
    assert sum(2 * size <= capacity for size in filled) <= 1


def test_packing_is_the_best_fit():
    assert packed_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert packed_rows([2, 9, 8, 1], 10) == [[1, 3], [2, 0]]
    for wrong in ([0], [11]):
        with pytest.raises(ValueError, match="capacity"):
            packed_rows(wrong, 10)


def test_packing_is_fast():
    lengths = np.random.default_rng(0).integers(1, 4096, 100_000).tolist()
    rows = packed_rows(lengths, 4096)
    assert sum(lengths) / (4096 * len(rows)) > 0.99


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_every_document_with_shifted_targets(packing):
    loader = make(packing=packing)
    batch = loader.batch(0)
    assert set(batch) == {"input_ids", "targets", "positions", "segment_ids"}
    for array in batch.values():
        assert array.shape == (2, 2, loader.row_length)
        assert array.dtype == np.int32
    seen = []
    rows = epoch(loader)
    for ids, targets, positions, segments in zip(*rows.values(), strict=True):
        for segment in range(1, segments.max() + 1):
            (place,) = np.nonzero(segments == segment)
            index = int(ids[place[0]]) // 100 - 1
            document = documents()[index]
            seen.append(index)
            assert ids[place].tolist() == document.input_ids.tolist()
            assert positions[place].tolist() == list(range(len(document)))
            expected = np.where(document.trained[1:], document.input_ids[1:], -100)
            assert targets[place].tolist() == [*expected.tolist(), -100]
        empty = segments == 0
        assert (targets[empty] == -100).all()
        assert (ids[empty] == 0).all()
    assert sorted(seen) == list(range(len(LENGTHS)))
    trained = sum(document.trained_tokens for document in documents())
    assert (rows["targets"] != -100).sum() == trained


def test_a_batch_is_a_function_of_seed_and_step():
    loader, again = make(seed=7), make(seed=7)
    far = again.batch(5)
    for step in (2, 5, 0):
        batch = loader.batch(step)
        for name, array in again.batch(step).items():
            np.testing.assert_array_equal(array, batch[name])
    np.testing.assert_array_equal(far["input_ids"], loader.batch(5)["input_ids"])
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert (first["input_ids"] != second["input_ids"]).any()
    assert (first["input_ids"] != epoch(make(seed=8))["input_ids"]).any()
    assert loader.fingerprint == make(seed=8).fingerprint
    assert (
        loader.fingerprint
        != Loader(documents([5, 4]), batch_size=1, max_length=12).fingerprint
    )


def test_the_order_is_recorded():
    """A resumed run must find the order of the run before, for ever."""
    order = make(seed=42, batch_size=11, accumulation=1).batch(0)["input_ids"]
    first_tokens = (order[0, :, 0] // 100 - 1).tolist()
    assert first_tokens == ORDER_OF_SEED_42


def test_evaluation_keeps_the_order():
    rows = epoch(make(shuffle=False))["input_ids"]
    starts = rows[rows[:, 0] > 0, 0]
    assert starts.tolist() == [100 * (i + 1) for i in range(len(LENGTHS))]


def test_rows_are_as_long_as_they_must_be():
    assert make().row_length == 12
    assert make(max_length=200).row_length == 64
    assert make(max_length=200, pad_to_multiple_of=8).row_length == 16
    assert make(max_length=200, packing=True).row_length == 64
    assert make(max_length=12, packing=True).row_length == 12


def test_segments_are_bounded_by_a_power_of_two():
    assert make().max_segments == 1
    packed = make(packing=True)
    most = max(b["segment_ids"].max() for b in map(packed.batch, range(len(packed))))
    assert most <= packed.max_segments < 2 * most
    assert 0.5 < packed.fill <= 1.0


def test_fewer_rows_than_a_batch():
    loader = Loader(documents([3, 4, 5]), batch_size=8, max_length=8, pad_id=9)
    assert (len(loader), loader.rows) == (1, 3)
    batch = loader.batch(4)
    assert (batch["segment_ids"].max(axis=-1)[0] > 0).sum() == 3
    assert (batch["input_ids"][batch["segment_ids"] == 0] == 9).all()


def test_no_documents():
    with pytest.raises(DataError, match="no documents"):
        Loader([], batch_size=1, max_length=8)
