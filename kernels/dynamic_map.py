"""The dynamic 8-bit data type, arxiv.org/abs/1511.04561, as bitsandbytes has it."""

import numpy as np


def dynamic_map(*, is_signed: bool) -> np.ndarray:
    """Returns the 256 values in float32, sorted; a code is an index into them.

    Decade `10 ** (e - 6)` holds the centres of `2 ** e` equal parts of [0.1, 1], of
    twice as many without a sign; 0 and 1 are added. The roundings to float32 are those
    of bitsandbytes: the parts' borders are counted from the nearer end, rounded once.
    """
    low, high = np.float32(0.1), np.float32(1)
    magnitudes = []
    for e in range(7):
        parts = 2**e if is_signed else 2 ** (e + 1)
        step = np.float64((high - low) / np.float32(parts))
        k = np.arange(parts + 1)
        from_low, from_high = low + k * step, high - k[::-1] * step
        borders = np.where(k < (parts + 1) // 2, from_low, from_high)
        borders = borders.astype(np.float32)
        centres = (borders[:-1] + borders[1:]) / np.float32(2)
        magnitudes.append(np.float32(10.0 ** (e - 6)) * centres)
    positive = np.concatenate(magnitudes)
    negative = -positive if is_signed else positive[:0]
    ends = np.asarray([0, 1], np.float32)
    return np.sort(np.concatenate([negative, ends, positive]))
