"""Puts documents into rows of a fixed length, none of them split."""

import bisect
from collections.abc import Sequence


def packed_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns document indices of each row: best-fit decreasing bin packing.

    Each document, the longest first, goes to the row with the least room that still
    takes it. Ties go to the older row, so the answer depends on the lengths alone.
    O(n log n + n C) with C distinct free sizes, at most `capacity`.

    Raises:
      ValueError: A document is empty or longer than `capacity`.
    """
    if any(not 0 < length <= capacity for length in lengths):
        raise ValueError(f"every length must be in 1..{capacity=}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # Distinct free sizes, sorted.
    rows_with_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].pop(0)
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        rows[row].append(index)
        if left := room - length:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
                rows_with_room[left] = []
            bisect.insort(rows_with_room[left], row)
    return rows
