"""The numbers that 4-bit codes and 8-bit scale codes stand for."""

from typing import Literal

import numpy as np

from kernels.dynamic_map import dynamic_map

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

CODEBOOKS: dict[Code, np.ndarray] = {
    "nf4": np.asarray(_NF4, np.float32),
    "fp4": np.asarray([*_FP4_MAGNITUDES, *_FP4_NEGATIVES], np.float32),
}
DYNAMIC_MAP: np.ndarray = dynamic_map(is_signed=True)
