"""Rotary position embedding: the wavelengths, and their tables for given positions."""

import math
from typing import Literal

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.rope import rotary_tables


class RotaryEmbedding(nnx.Module):
    """Cosines and sines of each position (2104.09864); holds numbers, no arrays."""

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float,
        kind: Literal["default", "linear", "llama3"] = "default",
        factor: float = 1.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_context: int = 8192,
    ) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.kind = kind
        self.factor = factor
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor
        self.original_context = original_context

    def __call__(
        self, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T half_H"], Float[Array, "B T half_H"]]:
        """Returns the float32 cosines and sines of `positions`."""
        return rotary_tables(positions, self.inverse_frequencies())

    def inverse_frequencies(self) -> Float[np.ndarray, " half_H"]:
        """Returns radians per position of each pair of features."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        inv_freq = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return inv_freq / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(inv_freq)
        return inv_freq

    def _llama3(self, inv_freq: np.ndarray) -> np.ndarray:
        wavelengths = 2 * math.pi / inv_freq
        turns = self.original_context / wavelengths
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        stretched = inv_freq / self.factor
        return ((1 - kept) * stretched + kept * inv_freq).astype(np.float32)
