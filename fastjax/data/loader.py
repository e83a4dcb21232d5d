"""Batches as a pure function of (seed, step)."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from fastjax.data.packing import packed_rows
from fastjax.data.tokenization import Document
from fastjax.errors import DataError

IGNORED = -100
Batch = dict[str, Int32[np.ndarray, "A B S"]]


class Loader:
    """Batches of documents; the step number is its whole state.

    Every row is seen once an epoch: the last batch is filled with empty rows, whose
    segment is 0 and whose targets are all ignored. Each epoch has an order of its own;
    packing is done once, so that only the order of rows changes.

    Args:
      documents: What is trained; none longer than `max_length`.
      batch_size: Rows of a micro-batch.
      accumulation: Micro-batches of a step.
      max_length: Most tokens of a row.
      packing: Several documents share a row, isolated by segment.
      seed: Of the order.
      shuffle: False keeps the order of `documents`, for evaluation.
      pad_id: Fills the end of rows; it is never a target.
      pad_to_multiple_of: Rows are as long as the longest, rounded up to this.

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
        lengths = [len(document) for document in documents]
        self._documents = documents
        self._rows = (
            packed_rows(lengths, max_length)
            if packing
            else [[index] for index in range(len(documents))]
        )
        longest = max(sum(lengths[i] for i in row) for row in self._rows)
        rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        self.row_length: int = min(max_length, rounded)
        self._shape = (accumulation, batch_size)
        self._seed, self._shuffle, self._pad_id = seed, shuffle, pad_id
        self._order: tuple[int, Int32[np.ndarray, " N"]] | None = None

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
        most = max(len(row) for row in self._rows)
        return 1 << (most - 1).bit_length()

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that hold a token."""
        tokens = sum(len(document) for document in self._documents)
        return tokens / (len(self._rows) * self.row_length)

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and masks, in order: what a resumed run must find."""
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(np.int64(len(document)).tobytes())
            digest.update(document.input_ids.tobytes())
            digest.update(document.trained.tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """Returns input_ids, targets, positions and segment_ids of one step.

        `targets[t]` is token t + 1 where that is trained and of the same document,
        else -100. Positions restart and segments count up, from 1, at each document;
        padding is segment 0.

        Args:
          step: From 0; it goes on over epochs without end.
        """
        accumulation, batch_size = self._shape
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * accumulation * batch_size
        order = self._epoch_order(epoch)
        chosen = order[first : first + accumulation * batch_size]
        shape = (accumulation * batch_size, self.row_length)
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int32),
            "targets": np.full(shape, IGNORED, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
        }
        for place, row in enumerate(chosen.tolist()):
            self._fill_row({name: array[place] for name, array in batch.items()}, row)
        whole = (accumulation, batch_size, self.row_length)
        return {name: array.reshape(whole) for name, array in batch.items()}

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

    def _epoch_order(self, epoch: int) -> Int32[np.ndarray, " N"]:
        if not self._shuffle:
            return np.arange(len(self._rows), dtype=np.int32)
        if self._order is None or self._order[0] != epoch:
            # The bits of a generator never change between NumPy versions, while
            # `permutation` may.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
            draws = bits.random_raw(len(self._rows))
            order = np.argsort(draws, kind="stable").astype(np.int32)
            self._order = (epoch, order)
        return self._order[1]
