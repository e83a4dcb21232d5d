"""The static settings of the op."""

from dataclasses import dataclass

CHUNK_TOKENS = 2048
"""Rows whose logits exist at a time, unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is fixed when the op is traced; see the public functions."""

    softcap: float | None
    ignore_index: int
    chunk_tokens: int
    head_is_trainable: bool

    def __post_init__(self) -> None:
        if self.chunk_tokens <= 0:
            raise ValueError(f"{self.chunk_tokens=} must be positive")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"{self.softcap=} must be positive")
