"""What training asks of a data loader, and batches on their way to the device."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int


@runtime_checkable
class Loader(Protocol):
    """Batches as a pure function of the step, so that any step can come next.

    Attributes:
      steps_per_epoch: Batches of one pass over the data.
      max_segments: Upper bound of the documents in a row, None when unknown.
      fingerprint: Hash of the data, in order; what rows are made of them is apart.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def max_segments(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def batch(self, step: int) -> Mapping[str, Int[np.ndarray, "A B S"]]:
        """Returns input_ids, targets, positions, segment_ids of a step, from 0."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch whose transfer has begun, and what the host knows of it.

    Attributes:
      arrays: Device arrays of shape (A, B, S).
      num_tokens: Tokens that are not padding.
      num_rows: Rows with at least one token.
    """

    arrays: dict[str, Any]
    num_tokens: int
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(micro-batches, rows, tokens), by which compiled steps are kept."""
        return self.arrays["input_ids"].shape


def put_batch(loader: Loader, step: int) -> DeviceBatch:
    """Returns the batch of a step; its transfer may still be under way."""
    arrays = dict(loader.batch(step))
    is_token = arrays["segment_ids"] > 0
    return DeviceBatch(
        arrays=jax.device_put(arrays),
        num_tokens=int(is_token.sum()),
        num_rows=int(is_token.any(axis=-1).sum()),
    )
