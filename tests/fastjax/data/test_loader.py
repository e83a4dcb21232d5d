"""Batches: shapes, shifted targets, isolation, order, and every row once an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjax.data import Document, Loader
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
        name: np.concatenate([widened(b[name], loader.row_length) for b in batches])
        for name in batches[0]
    }


def widened(array: np.ndarray, row_length: int) -> np.ndarray:
    flat = array.reshape(-1, array.shape[-1])
    return np.pad(flat, ((0, 0), (0, row_length - flat.shape[1])))


def chats(count: int, seed: int = 0) -> list[int]:
    """Makes lengths like those of chats: most short, a few as long as a row."""
    lengths = np.random.default_rng(seed).lognormal(np.log(100.0), 0.9, count)
    return np.clip(lengths, 2, 2000).astype(int).tolist()


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


def test_evaluation_tells_which_rows_it_has():
    loader = Loader(documents(LENGTHS * 40), batch_size=2, max_length=12, shuffle=False)
    for step in (0, 7, len(loader) - 1, len(loader) + 7):
        first_tokens = loader.batch(step)["input_ids"][0, :, 0]
        expected = 100 * (loader.rows_of(step) + 1)
        assert first_tokens[: len(expected)].tolist() == expected.tolist()
    rows = [loader.rows_of(step) for step in range(len(loader))]
    assert np.concatenate(rows).tolist() == list(range(loader.rows))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=150),
    batch_size=st.integers(1, 3),
    options=st.fixed_dictionaries(
        {
            "accumulation": st.integers(1, 2),
            "packing": st.booleans(),
            "shuffle": st.booleans(),
            "seed": st.integers(0, 3),
        }
    ),
    room=st.integers(0, 9),
)
def test_an_epoch_has_every_row_once_in_few_shapes(lengths, batch_size, options, room):
    max_length = max(lengths) + room
    options |= {"batch_size": batch_size, "max_length": max_length}
    loader = Loader(documents(lengths), **options)
    for number in (0, 3):
        steps = range(number * len(loader), (number + 1) * len(loader))
        batches = {step: loader.batch(step) for step in steps}
        tokens = np.concatenate([b["input_ids"].ravel() for b in batches.values()])
        expected = np.concatenate([d.input_ids for d in documents(lengths)])
        assert sorted(tokens[tokens > 0]) == sorted(expected)
        rows = np.concatenate([loader.rows_of(step) for step in steps])
        assert sorted(rows) == list(range(loader.rows))
        shapes = [b["input_ids"].shape for b in batches.values()]
        assert len(set(shapes)) <= min(6, 1 + len(loader) // 16)
        assert shapes[0] == max(shapes)
        for shape in shapes:
            assert shape[2] % 64 == 0 or shape[2] == max_length + max_length % 2
        again = Loader(documents(lengths), **options)
        for step in reversed(steps):
            for name, array in again.batch(step).items():
                np.testing.assert_array_equal(array, batches[step][name])
    most = max(b["segment_ids"].max() for b in batches.values())
    assert most <= loader.max_segments


def test_rows_of_like_length_meet():
    lengths = chats(4000)
    loader = Loader(documents(lengths), batch_size=2, accumulation=4, max_length=2048)
    assert np.mean(lengths) / max(lengths) < 0.08
    assert loader.fill > 0.6
    shapes = {loader.batch(step)["input_ids"].shape for step in range(len(loader))}
    assert len(shapes) <= 6
    first, second = (
        {frozenset(loader.rows_of(e * len(loader) + i).tolist()) for i in range(500)}
        for e in range(2)
    )
    assert len(first & second) < 5
    means = [np.mean([lengths[r] for r in loader.rows_of(i)]) for i in range(1, 500)]
    half = len(means) // 2
    assert 0.7 < np.mean(means[:half]) / np.mean(means[half:]) < 1.4


def test_fill_counts_every_position_of_an_epoch():
    loader = Loader(documents(chats(300)), batch_size=7, max_length=2048)
    batches = [loader.batch(step) for step in range(len(loader))]
    tokens = sum(int((b["segment_ids"] > 0).sum()) for b in batches)
    assert loader.fill == tokens / sum(b["input_ids"].size for b in batches)


def test_the_fingerprint_is_computed_once(monkeypatch):
    loader = make()
    first = loader.fingerprint
    monkeypatch.setattr("hashlib.sha256", None)
    assert loader.fingerprint == first


def test_rows_are_as_long_as_they_must_be():
    assert make().row_length == 12
    assert make(max_length=200).row_length == 64
    assert make(max_length=200, pad_to_multiple_of=8).row_length == 16
    assert make(max_length=200, packing=True).row_length == 64
    assert make(max_length=12, packing=True).row_length == 12
    assert make(max_length=11).row_length == 12


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
