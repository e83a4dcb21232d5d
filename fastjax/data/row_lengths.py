"""The few row lengths that a data set is padded to."""

import numpy as np
from jaxtyping import Int32, Int64


def padded_lengths(
    tokens: Int64[np.ndarray, " N"], *, shapes: int, multiple: int, limit: int
) -> Int32[np.ndarray, " N"]:
    """Returns the row length of each row, from the few lengths that pad the least.

    The lengths are those, of all choices of `shapes` multiples, with the fewest
    positions in sum. Dynamic programming over the distinct multiples, C of them:
    O(shapes C²).

    Args:
      tokens: Tokens of each row, at most `limit`.
      shapes: Most distinct lengths, from 1; each costs a compilation.
      multiple: Of which every length is, but for `limit`.
      limit: No row is longer, but for one position that makes it even: cuDNN's
        attention takes even lengths alone.
    """
    lengths, rows_of_length = np.unique(tokens, return_counts=True)
    rounded = np.minimum(-(-lengths // multiple) * multiple, limit + limit % 2)
    sizes, place = np.unique(rounded, return_inverse=True)
    rows = np.bincount(place, weights=rows_of_length).astype(np.int64)
    rows_before = np.concatenate([[0], np.cumsum(rows)])
    # cost[j, i]: positions when sizes i..j all become size j.
    cost = (rows_before[1:, None] - rows_before[None, :]) * sizes[:, None]
    cost = np.where(cost > 0, cost, np.iinfo(np.int64).max // 2)
    best = np.concatenate([[0], cost[:, 0]])
    starts = [np.zeros(len(sizes), np.int64)]
    for _ in range(min(shapes, len(sizes)) - 1):
        total = cost + np.minimum(best, np.iinfo(np.int64).max // 2)[None, :]
        starts.append(total.argmin(axis=1))
        best = np.concatenate([[0], total.min(axis=1)])
    chosen, last = [], len(sizes)
    for start in reversed(starts):
        if last:
            chosen.append(sizes[last - 1])
            last = int(start[last - 1])
    chosen = np.array(chosen[::-1], np.int32)
    return chosen[np.searchsorted(chosen, tokens)]
