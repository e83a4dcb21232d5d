"""What a trainer shows of its rows and runs, as transformers and datasets do."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from fastjax.data import Documents
from fastjax.train import TrainResult
from fastjax.train.metrics import NAME as METRICS_FILE


class TrainOutput(NamedTuple):
    """What `train` returns, as transformers' class of this name."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class PredictionOutput(NamedTuple):
    """What `predict` returns.

    Attributes:
      predictions: (rows, length) float32 log-probability of each label; 0 where there
        is none. Whole logits would not fit in memory.
      label_ids: (rows, length) labels, -100 where there is none.
      metrics: test_loss, test_perplexity, test_runtime.
    """

    predictions: np.ndarray
    label_ids: np.ndarray
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Where a trainer is; all of it after `train` has returned.

    Attributes:
      global_step: Optimiser steps done.
      epoch: Passes over the data, as a fraction.
      log_history: The lines of metrics.jsonl, from before a resume too, and what
        `train` returned; a loss that is not finite is NaN.
    """

    global_step: int = 0
    epoch: float = 0.0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, result: TrainResult, folder: Path) -> "TrainerState":
        """Returns the state after a run whose files are in a folder."""
        file = folder / METRICS_FILE  # Of a run that had ended before it may be gone.
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
        own = {k: v for k, v in result.metrics.items() if not k.startswith("eval_")}
        records = [*map(json.loads, lines), {"step": result.step, **own}]
        return cls(
            global_step=result.step,
            epoch=float(own["epoch"] or 0),
            log_history=list(map(numbers, records)),
        )


class TokenRows(Sequence[dict[str, list[int]]]):
    """Tokenised rows: input_ids, attention_mask and labels, -100 without loss."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> dict[str, list[int]]: ...

    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...

    def __getitem__(self, index: int | slice) -> "dict[str, list[int]] | TokenRows":
        """Returns a row, or a choice of rows."""
        if isinstance(index, slice):
            return TokenRows(self._documents[index])
        document = self._documents[index]
        return {
            "input_ids": document.input_ids.tolist(),
            "attention_mask": [1] * len(document),
            "labels": np.where(document.trained, document.input_ids, -100).tolist(),
        }


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with NaN for null: JSON has no NaN."""
    return {name: math.nan if v is None else v for name, v in record.items()}
