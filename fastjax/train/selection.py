"""The best evaluation so far, and whether better ones can still be hoped for."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastjax.config import ReportConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class Selection:
    """Follows one metric of the evaluations, of which smaller is better.

    Attributes:
      config: Which metric, and when to stop.
      best: Step and value of the best evaluation; None before the first.
      without_progress: Evaluations since it got better by more than the threshold.
    """

    config: ReportConfig
    best: dict[str, float | int] | None = None
    without_progress: int = 0

    @property
    def is_on(self) -> bool:
        """Whether the best weights are kept."""
        return (
            self.config.load_best_model_at_end
            or self.config.early_stopping_patience > 0
        )

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation."""
        return None if self.best is None else int(self.best["step"])

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        patience = self.config.early_stopping_patience
        return 0 < patience <= self.without_progress

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes in an evaluation; returns whether it is the best."""
        name = self.config.metric_for_best_model
        value = metrics[name]
        before = math.inf if self.best is None else self.best[name]
        improves = value < before - self.config.early_stopping_threshold
        self.without_progress = 0 if improves else self.without_progress + 1
        if not value < before:
            return False
        self.best = {"step": step, name: value}
        return True

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"best": self.best, "without_progress": self.without_progress}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes back what a checkpoint kept; of another metric it starts anew."""
        best = saved.get("best")
        if best is None or self.config.metric_for_best_model in best:
            self.best = best
            self.without_progress = saved.get("without_progress", 0)
