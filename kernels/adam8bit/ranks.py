"""A table that finds the nearest value of a dynamic map with one look-up.

The leading bits of a positive float32 number, its exponent and some of its mantissa,
name a cell. Cells are so narrow that at most one midpoint of the map lies in each. An
entry holds, in its upper bits, how many midpoints lie below the cell, and in the others
what carries into the upper ones when added to the trailing bits of a number above the
cell's own midpoint. So `(entry + trailing bits) >> shift` is the number of midpoints
below, which is the code among the values from 0 to 1.
"""

from dataclasses import dataclass

import numpy as np

from .blocks import MU_MAP, NU_MAP

_MANTISSA_BITS = 23
_PAD_TO = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """The table of a map.

    Attributes:
      entries: int32; the first cell reaches down to 0, those after 1 are padding.
      first: Leading bits of the first cell.
      shift: Number of trailing bits.
      zero_code: Code of 0, which is also how many values are negative: those are minus
        the positive ones, without 1.
    """

    entries: np.ndarray
    first: int
    shift: int
    zero_code: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Ranks":
        """Returns the table of a sorted map from -1 or 0 to 1."""
        positive = values[values >= 0]
        midpoints = ((positive[:-1] + positive[1:]) / np.float32(2)).view(np.int32)
        shift = next(
            shift
            for shift in range(_MANTISSA_BITS, 0, -1)
            if np.unique(midpoints >> shift).size == midpoints.size
        )
        one = int(np.ones(1, np.float32).view(np.int32)[0]) >> shift
        first = int(midpoints[0] >> shift) - 1
        count = -(-(one + 1 - first) // _PAD_TO) * _PAD_TO
        cells = np.arange(first, first + count)
        entries = np.searchsorted(midpoints >> shift, cells).astype(np.int32) << shift
        trailing = (1 << shift) - 1
        entries[(midpoints >> shift) - first] += trailing - (midpoints & trailing)
        return cls(
            entries=entries,
            first=first,
            shift=shift,
            zero_code=values.size - positive.size,
        )

    @property
    def trailing(self) -> int:
        """The trailing bits, all set."""
        return (1 << self.shift) - 1


MU_RANKS, NU_RANKS = Ranks.of(MU_MAP), Ranks.of(NU_MAP)
