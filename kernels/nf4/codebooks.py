"""The numbers that 4-bit codes and 8-bit scale codes stand for."""

from typing import Literal

import numpy as np

Code = Literal["nf4", "fp4"]

# Quantiles of the normal distribution: arxiv.org/abs/2305.14314, appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# Sign, two bits of exponent, one of mantissa; codes 0 and 8 are both +0.
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_FP4_NEGATIVES = (0.0, *(-m for m in _FP4_MAGNITUDES[1:]))


def _dynamic_map() -> np.ndarray:
    """Returns the signed dynamic 8-bit data type (arxiv.org/abs/1511.04561), sorted.

    Decade `10 ** (e - 6)` holds the centres of `2 ** e` equal parts of [0.1, 1]. The
    roundings to float32 are those of the map inside bitsandbytes' files: the parts'
    borders are counted from the nearer end and rounded once.
    """
    low, high = np.float32(0.1), np.float32(1)
    magnitudes = []
    for e in range(7):
        step = np.float64((high - low) / np.float32(2**e))
        k = np.arange(2**e + 1)
        from_low, from_high = low + k * step, high - k[::-1] * step
        borders = np.where(k < (2**e + 1) // 2, from_low, from_high).astype(np.float32)
        centres = (borders[:-1] + borders[1:]) / np.float32(2)
        magnitudes.append(np.float32(10.0 ** (e - 6)) * centres)
    positive = np.concatenate(magnitudes)
    return np.sort(
        np.concatenate([-positive, np.asarray([0, 1], np.float32), positive])
    )


CODEBOOKS: dict[Code, np.ndarray] = {
    "nf4": np.asarray(_NF4, np.float32),
    "fp4": np.asarray([*_FP4_MAGNITUDES, *_FP4_NEGATIVES], np.float32),
}
DYNAMIC_MAP: np.ndarray = _dynamic_map()
