"""Batches as a pure function of (seed, step)."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from fastjax.data.documents import Document, Documents
from fastjax.data.packing import Rows, documents_per_row, packed_rows
from fastjax.data.row_lengths import padded_lengths
from fastjax.errors import DataError

IGNORED = -100
# Each shape of batch is compiled once, which must pay: a data set has one more for
# each so many steps of an epoch, up to the limit.
_STEPS_PER_SHAPE, _MOST_SHAPES = 16, 6
_NO_ROW = -1
Batch = dict[str, Int32[np.ndarray, "A B S"]]


class Loader:
    """Batches of documents; the step number is its whole state.

    Every row is seen once an epoch; one batch is filled up with empty rows, whose
    segment is 0 and whose targets are all ignored.

    Rows of one step are padded to one length, of the few that the data set has. An
    epoch is shuffled, sorted by these lengths alone, cut into steps, and the steps are
    shuffled: rows meet others of like length, but ever different ones. The longest
    step comes first, so that what does not fit in memory shows at once. Packing is
    done once; packed rows are nearly full and have one length.

    Args:
      documents: What is trained; none longer than `max_length`.
      batch_size: Rows of a micro-batch.
      accumulation: Micro-batches of a step.
      max_length: Most tokens of a row.
      packing: Several documents share a row, isolated by segment.
      seed: Of the order.
      shuffle: False, for evaluation, takes rows of one length in order of
        `documents`, the longest length first; `rows_of` tells which they are.
      pad_id: Fills the end of rows; it is never a target.
      pad_to_multiple_of: Row lengths are multiples of this, but for `max_length`,
        which is only made even.

    Raises:
      DataError: There are no documents.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        batch_size: int,
        max_length: int,
        accumulation: int = 1,
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        pad_id: int = 0,
        pad_to_multiple_of: int = 64,
    ) -> None:
        if not documents:
            raise DataError("there are no documents to make batches of")
        self._documents = Documents.of(documents)
        lengths = self._documents.lengths
        self._rows = (
            packed_rows(
                lengths, max_length, most=documents_per_row(lengths, max_length)
            )
            if packing
            else Rows.of_one_each(len(documents))
        )
        self._shape = (accumulation, batch_size)
        shapes = min(_MOST_SHAPES, 1 + self.steps_per_epoch // _STEPS_PER_SHAPE)
        self._padded: Int32[np.ndarray, " N"] = padded_lengths(
            self._rows.sums(lengths) if packing else lengths,
            shapes=1 if packing else shapes,
            multiple=pad_to_multiple_of,
            limit=max_length,
        )
        self._seed, self._shuffle, self._pad_id = seed, shuffle, pad_id
        self._order: tuple[int, Int64[np.ndarray, "steps rows"]] | None = None

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once."""
        accumulation, batch_size = self._shape
        return -(-len(self._rows) // (accumulation * batch_size))

    def __len__(self) -> int:
        return self.steps_per_epoch

    @property
    def max_segments(self) -> int:
        """Bound of the documents in a row, a power of two."""
        most = int(self._rows.counts.max())
        return 1 << (most - 1).bit_length()

    @property
    def row_length(self) -> int:
        """Positions of the longest row; those of one step may have fewer."""
        return int(self._padded.max())

    @property
    def step_lengths(self) -> Int32[np.ndarray, " steps"]:
        """Positions of the rows of each step of an epoch, the longest first."""
        accumulation, batch_size = self._shape
        # Steps are cut from rows in order of length: the first of each is its longest.
        return np.sort(self._padded)[::-1][:: accumulation * batch_size]

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that hold a token."""
        accumulation, batch_size = self._shape
        rows = accumulation * batch_size
        return self._documents.tokens / (int(self.step_lengths.sum()) * rows)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and masks, in order: what a resumed run must find."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self._documents.fingerprint()

    def batch(self, step: int) -> Batch:
        """Returns input_ids, targets, positions and segment_ids of one step.

        `targets[t]` is token t + 1 where that is trained and of the same document,
        else -100. Positions restart and segments count up, from 1, at each document;
        padding is segment 0.

        Args:
          step: From 0; it goes on over epochs without end.
        """
        accumulation, batch_size = self._shape
        chosen = self.rows_of(step)
        row_length = int(self._padded[chosen].max())
        shape = (accumulation * batch_size, row_length)
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int32),
            "targets": np.full(shape, IGNORED, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
        }
        for place, row in enumerate(chosen.tolist()):
            self._fill_row({name: array[place] for name, array in batch.items()}, row)
        whole = (accumulation, batch_size, row_length)
        return {name: array.reshape(whole) for name, array in batch.items()}

    def rows_of(self, step: int) -> Int64[np.ndarray, " n"]:
        """Returns the numbers of a step's rows, without the empty ones at its end.

        Unpacked, the number of a row is the place of its document.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._epoch_order(epoch)[index]
        return rows[rows != _NO_ROW]

    def _fill_row(self, arrays: dict[str, Int32[np.ndarray, " S"]], row: int) -> None:
        start = 0
        for segment, index in enumerate(self._rows[row], start=1):
            document = self._documents[index]
            end = start + len(document)
            ids = document.input_ids
            arrays["input_ids"][start:end] = ids
            targets = np.where(document.trained[1:], ids[1:], np.int32(IGNORED))
            arrays["targets"][start : end - 1] = targets
            arrays["positions"][start:end] = np.arange(len(document), dtype=np.int32)
            arrays["segment_ids"][start:end] = segment
            start = end

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, "steps rows"]:
        """Returns the rows of each step, filled up with `_NO_ROW`."""
        key = epoch if self._shuffle else 0
        if self._order is None or self._order[0] != key:
            self._order = (key, self._new_order(epoch))
        return self._order[1]

    def _new_order(self, epoch: int) -> Int64[np.ndarray, "steps rows"]:
        accumulation, batch_size = self._shape
        steps, per_step = self.steps_per_epoch, accumulation * batch_size
        # The bits of a generator never change between NumPy versions, while
        # `permutation` may.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        order = np.arange(len(self._rows))
        if self._shuffle:
            order = np.argsort(bits.random_raw(len(order)), kind="stable")
        order = order[np.argsort(-self._padded[order], kind="stable")]
        empty = np.full(steps * per_step - len(order), _NO_ROW)
        whole = np.concatenate([order, empty]).reshape(steps, per_step)
        if self._shuffle and steps > 1:
            rest = np.argsort(bits.random_raw(steps - 1), kind="stable")
            whole[1:] = whole[1:][rest]
        return whole
