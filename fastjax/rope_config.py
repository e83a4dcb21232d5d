"""Rotary position embedding in numbers: its kinds, and the wavelengths of each."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from fastjax.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (2104.09864) and how it is stretched.

    Attributes:
      kind: "default"; "linear" divides the positions by `factor` (2306.15595);
        "dynamic" raises `theta` with the length of a document that is longer than the
        trained context; "llama3" divides only the low frequencies (Llama 3.1 model
        card); "yarn" ramps between the two (2309.00071); "longrope" divides each
        frequency by its own factor, short documents and long ones apart
        (2402.13753); "none" turns nothing.
      theta: Base of the geometric series of wavelengths.
      rotary_share: Share of the head's features that turn, the first ones.
      factor: How many times longer the stretched context is.
      original_max_position_embeddings: Context of pre-training in tokens.
      attention_factor: Scales cosines and sines ("yarn", "longrope").
      low_freq_factor: Wavelengths above `original_max_position_embeddings` over this
        are divided by the whole `factor` ("llama3").
      high_freq_factor: Wavelengths below `original_max_position_embeddings` over this
        stay as they are ("llama3").
      beta_fast: Frequencies that turn more often in the trained context stay as they
        are ("yarn").
      beta_slow: Those that turn less often are divided by the whole `factor`.
      truncate: The ends of the ramp between them are whole numbers ("yarn").
      short_factors: Divisor of each frequency up to the trained context ("longrope").
      long_factors: The same beyond it.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_share: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether the wavelengths of a document depend on its length."""
        return self.kind in ("dynamic", "longrope")

    def stretched(self, kind: RopeKind, *, trained: int, factor: float) -> "RopeConfig":
        """Returns the same positions for a longer context.

        Args:
          kind: "linear", "dynamic" or "yarn".
          trained: Context of pre-training in tokens.
          factor: How many times longer than that the new context is.

        Raises:
          ConfigError: The positions are stretched in another way already.
        """
        if self.kind not in ("default", kind):
            raise ConfigError(
                f"rope_scaling={kind} cannot stretch the RoPE of this model, which is "
                f"of kind {self.kind} already",
                fix="set max_length to the context of the model, or rope_scaling to "
                "that kind if it is linear, dynamic or yarn",
            )
        changes: dict[str, Any] = {"kind": kind, "factor": factor}
        if kind != "linear":
            changes["original_max_position_embeddings"] = trained
        if kind == "yarn" and math.isclose(
            self.attention_factor, yarn_attention_factor(self.factor)
        ):
            changes["attention_factor"] = yarn_attention_factor(factor)
        return dataclasses.replace(self, **changes)

    def rotary_dim(self, head_dim: int) -> int:
        """Returns how many features of a head turn."""
        return int(head_dim * self.rotary_share)

    def inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Returns radians per position of each pair of features, unstretched by length.

        For kinds that depend on the length, those within the trained context.
        """
        dim = self.rotary_dim(head_dim)
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        inv_freq = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        match self.kind:
            case "none":
                return np.zeros_like(inv_freq)
            case "linear":
                return inv_freq / np.float32(self.factor)
            case "llama3":
                return self._llama3(inv_freq)
            case "yarn":
                return self._yarn(inv_freq, dim)
            case "longrope":
                return inv_freq / np.asarray(self.short_factors, np.float32)
        return inv_freq

    def long_inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Returns radians per position beyond the trained context ("longrope")."""
        plain = dataclasses.replace(self, kind="default").inverse_frequencies(head_dim)
        return plain / np.asarray(self.long_factors, np.float32)

    def _llama3(self, inv_freq: np.ndarray) -> np.ndarray:
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return _between(inv_freq / self.factor, inv_freq, kept)

    def _yarn(self, inv_freq: np.ndarray, dim: int) -> np.ndarray:
        low = dim * self._turning_pair(self.beta_fast)
        high = dim * self._turning_pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = (high - low) or 1e-3
        ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
        return _between(inv_freq / self.factor, inv_freq, 1.0 - ramp)

    def _turning_pair(self, turns: float) -> float:
        """Returns which pair turns so often in the trained context, as share of dim."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return math.log(wavelength) / (2 * math.log(self.theta))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Returns the scale of cosines and sines that "yarn" takes (2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _between(stretched: np.ndarray, kept: np.ndarray, share: np.ndarray) -> np.ndarray:
    return ((1 - share) * stretched + share * kept).astype(np.float32)
