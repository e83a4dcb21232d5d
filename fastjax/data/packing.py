"""Puts documents into rows of a fixed length, none of them split."""

import bisect
import heapq
from collections.abc import Sequence

# Documents above this share of a row are hard to place and go first, by best fit.
_LONG_SHARE = 8


def packed_rows(
    lengths: Sequence[int], capacity: int, *, most: int | None = None
) -> list[list[int]]:
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
    if any(not 0 < length <= capacity for length in lengths):
        raise ValueError(f"every length must be in 1..{capacity=}")
    if most is not None and most < 1:
        raise ValueError(f"{most=} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    is_long = [lengths[i] * _LONG_SHARE > capacity for i in order]
    first_short = sum(is_long)
    rows = _best_fit(lengths, order[:first_short], capacity, most)
    _spread(rows, lengths, order[first_short:], capacity, most)
    return rows


def _best_fit(
    lengths: Sequence[int], order: list[int], capacity: int, most: int | None
) -> list[list[int]]:
    """Returns rows: each document in the one with the least room that takes it."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # Distinct free sizes, sorted.
    rows_with_room: dict[int, list[int]] = {}  # Heaps: the oldest row is taken first.
    for index in order:
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = heapq.heappop(rows_with_room[room])
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        rows[row].append(index)
        left = room - lengths[index]
        if left and len(rows[row]) != most:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
                rows_with_room[left] = []
            heapq.heappush(rows_with_room[left], row)
    return rows


def _spread(
    rows: list[list[int]],
    lengths: Sequence[int],
    order: list[int],
    capacity: int,
    most: int | None,
) -> None:
    """Adds each document to the row with the most room, and rows where they lack."""
    rooms = [capacity - sum(lengths[i] for i in row) for row in rows]
    lacking = sum(lengths[i] for i in order) - sum(rooms)
    new_rows = max(0, -(-lacking // capacity))
    rooms += [capacity] * new_rows
    rows += [[] for _ in range(new_rows)]
    heap = [(-room, row) for row, room in enumerate(rooms) if len(rows[row]) != most]
    heapq.heapify(heap)
    for index in order:
        if not heap or -heap[0][0] < lengths[index]:
            heapq.heappush(heap, (-capacity, len(rows)))
            rows.append([])
        minus_room, row = heap[0]
        rows[row].append(index)
        if len(rows[row]) == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (minus_room + lengths[index], row))


def documents_per_row(lengths: Sequence[int], capacity: int) -> int:
    """Returns a bound for `packed_rows`: twice the mean of full rows, or a little more.

    It is a power of two, at least 8. Attention over packed rows keeps memory in
    proportion to the bound, whatever the rows hold.
    """
    mean = -(-capacity * len(lengths) // sum(lengths))
    return max(8, 1 << (2 * mean - 1).bit_length())
