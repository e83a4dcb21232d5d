"""Puts documents into rows of a fixed length, none of them split."""

import bisect
import dataclasses
import heapq
from array import array

import numpy as np
from jaxtyping import Int32, Int64

# Documents above this share of a row are hard to place and go first, by best fit.
_LONG_SHARE = 8
_ROW_BITS = 40


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Document indices of each row.

    They are held in 8 bytes a document at most, where lists would take a hundred.

    Attributes:
      documents: Indices, those of a row side by side.
      ends: Place in `documents` behind the last one of each row.
    """

    documents: Int32[np.ndarray, " D"]
    ends: Int32[np.ndarray, " R"]

    @classmethod
    def of_one_each(cls, count: int) -> "Rows":
        """Returns as many rows as documents."""
        numbers = np.arange(count + 1, dtype=np.int32)
        return cls(numbers[:-1], numbers[1:])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> list[int]:
        """Returns the documents of a row."""
        start = int(self.ends[row - 1]) if row else 0
        return self.documents[start : int(self.ends[row])].tolist()

    @property
    def counts(self) -> Int32[np.ndarray, " R"]:
        """Documents of each row."""
        return np.diff(self.ends, prepend=np.int32(0))

    def sums(self, values: Int64[np.ndarray, " D"]) -> Int64[np.ndarray, " R"]:
        """Returns the sum of the documents' values in each row."""
        return np.diff(np.cumsum(values[self.documents])[self.ends - 1], prepend=0)


def packed_rows(
    lengths: Int64[np.ndarray, " D"], capacity: int, *, most: int | None = None
) -> Rows:
    """Returns document indices of each row, a pure function of the lengths.

    Long documents are packed by best-fit decreasing. The short ones are then spread,
    the longest first, each to the row with the most room, over as many rows as they
    need: best fit would crowd the shortest of all into a few rows. O(n log n + n C)
    with C distinct free sizes, at most `capacity`.

    Args:
      lengths: Tokens of each document.
      capacity: Most tokens of a row.
      most: Most documents of a row, None for any number.

    Raises:
      ValueError: A document is empty or longer than `capacity`, or `most` is below 1.
    """
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"every length must be in 1..{capacity=}")
    if most is not None and most < 1:
        raise ValueError(f"{most=} must be at least 1")
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    first_short = np.count_nonzero(falling * _LONG_SHARE > capacity)
    filled = _FilledRows(capacity, most)
    _best_fit(filled, falling[:first_short])
    _spread(filled, falling[first_short:])
    row_of = np.asarray(filled.row_of)
    documents = order[np.argsort(row_of, kind="stable")].astype(np.int32)
    return Rows(documents, np.cumsum(np.asarray(filled.counts), dtype=np.int32))


class _FilledRows:
    """Rows while documents are put into them.

    Attributes:
      row_of: Row of each document, in the order in which they came.
      rooms: Free tokens of each row.
      counts: Documents of each row.
    """

    def __init__(self, capacity: int, most: int | None) -> None:
        self.capacity, self._most = capacity, most
        self.row_of, self.rooms, self.counts = array("i"), array("q"), array("i")

    def new_row(self) -> int:
        """Returns the number of a row that is added."""
        self.rooms.append(self.capacity)
        self.counts.append(0)
        return len(self.rooms) - 1

    def put(self, row: int, length: int) -> bool:
        """Puts a document into a row; returns whether it may take more."""
        self.row_of.append(row)
        self.rooms[row] -= length
        self.counts[row] += 1
        return self.is_open(row)

    def is_open(self, row: int) -> bool:
        """Whether a row may take more documents."""
        return self.counts[row] != self._most


def _best_fit(filled: _FilledRows, lengths: Int64[np.ndarray, " D"]) -> None:
    """Puts each document into the row with the least room that takes it."""
    rooms: list[int] = []  # Distinct free sizes, sorted.
    rows_with_room: dict[int, list[int]] = {}  # Heaps: the oldest row is taken first.
    for length in memoryview(lengths):  # Gives numbers one by one, never all at once.
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row = filled.new_row()
        else:
            room = rooms[place]
            row = heapq.heappop(rows_with_room[room])
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        is_open = filled.put(row, length)
        left = filled.rooms[row]
        if left and is_open:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
                rows_with_room[left] = []
            heapq.heappush(rows_with_room[left], row)


def _spread(filled: _FilledRows, lengths: Int64[np.ndarray, " D"]) -> None:
    """Puts each document into the row with the most room; adds rows where they lack."""
    lacking = int(lengths.sum()) - sum(filled.rooms)
    for _ in range(-(-lacking // filled.capacity)):
        filled.new_row()
    # One number holds how full a row is and which it is: half the memory of a pair.
    heap = [
        (filled.capacity - room) << _ROW_BITS | row
        for row, room in enumerate(filled.rooms)
        if filled.is_open(row)
    ]
    heapq.heapify(heap)
    for length in memoryview(lengths):
        if not heap or (heap[0] >> _ROW_BITS) + length > filled.capacity:
            heapq.heappush(heap, filled.new_row())
        row = heap[0] & (1 << _ROW_BITS) - 1
        if filled.put(row, length):
            heapq.heapreplace(heap, heap[0] + (length << _ROW_BITS))
        else:
            heapq.heappop(heap)


def documents_per_row(lengths: Int64[np.ndarray, " D"], capacity: int) -> int:
    """Returns a bound for `packed_rows`: twice the mean of full rows, or a little more.

    It is a power of two, at least 8. Attention over packed rows keeps memory in
    proportion to the bound, whatever the rows hold.
    """
    mean = -(-capacity * len(lengths) // int(lengths.sum()))
    return max(8, 1 << (2 * mean - 1).bit_length())
