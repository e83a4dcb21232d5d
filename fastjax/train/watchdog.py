"""Warns, once each, of a loss that diverges, does not move, or only learns by heart."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW = 5
_DIVERGED = 1.3
"""Times the lowest smoothed loss."""
_FLAT = 0.005
"""Relative change of a loss that does not move."""
_RECORDS_TO_JUDGE = 20


class Watchdog:
    """Reads the records of `metrics.jsonl` as they come.

    Args:
      peak_rate: Highest learning rate of the schedule.
    """

    def __init__(self, peak_rate: float) -> None:
        self._peak_rate = peak_rate
        self._losses: list[tuple[int, float]] = []
        self._evals: list[tuple[int, float]] = []
        self._said: set[str] = set()

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Returns new warnings: what is seen, where, and what usually causes it."""
        if record.get("loss") is not None:
            self._losses.append((record["step"], record["loss"]))
            found = [self._diverges(), self._stands_still()]
        elif record.get("eval_loss") is not None:
            self._evals.append((record["step"], record["eval_loss"]))
            found = [self._overfits()]
        else:
            found = []
        fresh = [
            (name, text) for name, text in found if text and name not in self._said
        ]
        self._said |= {name for name, _ in fresh}
        return [text for _, text in fresh]

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes in records of before a resume; their warnings were given then."""
        for record in records:
            self.observe(record)

    def _diverges(self) -> tuple[str, str]:
        if len(self._losses) < 2 * _WINDOW:
            return "diverges", ""
        losses = [loss for _, loss in self._losses]
        means = [
            statistics.fmean(losses[end - _WINDOW : end])
            for end in range(_WINDOW, len(losses) + 1)
        ]
        lowest = min(range(len(means)), key=means.__getitem__)
        if means[-1] <= _DIVERGED * means[lowest]:
            return "diverges", ""
        step = self._losses[lowest + _WINDOW - 1][0]
        return "diverges", (
            f"warning: the loss diverges: {means[lowest]:.3g} around step {step}, "
            f"{means[-1]:.3g} now. The usual cause is a learning_rate too high "
            f"({self._peak_rate:g}): lower it, raise warmup_steps, or lower "
            "max_grad_norm"
        )

    def _stands_still(self) -> tuple[str, str]:
        if len(self._losses) < _RECORDS_TO_JUDGE:
            return "flat", ""
        losses = [loss for _, loss in self._losses]
        first = statistics.fmean(losses[:_WINDOW])
        last = statistics.fmean(losses[-_WINDOW:])
        if abs(first - last) > _FLAT * abs(first):
            return "flat", ""
        return "flat", (
            f"warning: the loss does not move: {first:.4g} at first, {last:.4g} at "
            f"step {self._losses[-1][0]}. The usual causes are a learning_rate too low "
            f"({self._peak_rate:g}) or trained tokens that cannot be predicted: look "
            "at what is trained (train_on, the chat template)"
        )

    def _overfits(self) -> tuple[str, str]:
        if len(self._evals) < 3:
            return "overfits", ""
        (_, third), (_, second), (step, newest) = self._evals[-3:]
        best_step, best = min(self._evals, key=lambda pair: pair[1])
        since = [loss for at, loss in self._losses if at <= best_step]
        falls = bool(since) and self._losses[-1][1] < since[-1]
        if not (third < second < newest and falls):
            return "overfits", ""
        return "overfits", (
            f"warning: the run overfits: eval_loss rose to {newest:.4g} at step {step} "
            f"from {best:.4g} at step {best_step}, while the training loss falls. Stop "
            "there (early_stopping_patience, load_best_model_at_end), train fewer "
            "epochs, or add data or lora_dropout"
        )
