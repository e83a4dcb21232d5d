"""Warns, once each, of a loss that diverges, does not move, or only learns by heart."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW = 5
_DIVERGED = 1.3
"""Times the lowest smoothed loss."""
_FLAT = 0.005
"""Relative change of a loss that does not move."""
_RECORDS_TO_JUDGE = 20
_EVALS_TO_JUDGE = 3


class Watchdog:
    """Reads the records of `metrics.jsonl` as they come.

    Args:
      peak_rate: Highest learning rate of the schedule.
    """

    def __init__(self, peak_rate: float) -> None:
        self._peak_rate = peak_rate
        self._said: set[str] = set()
        self._count = 0
        self._newest: deque[float] = deque(maxlen=_WINDOW)
        self._step = 0
        self._first_mean = self._mean = 0.0
        self._lowest = (0, math.inf)
        self._evals: deque[float] = deque(maxlen=_EVALS_TO_JUDGE)
        self._best = (-1, math.inf)
        self._loss_at_best: float | None = None

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Returns new warnings: what is seen, where, and what usually causes it."""
        if record.get("loss") is not None:
            self._take_loss(record["step"], record["loss"])
            found = [self._diverges(), self._stands_still()]
        elif record.get("eval_loss") is not None:
            self._take_eval(record["step"], record["eval_loss"])
            found = [self._overfits(record["step"])]
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

    def _take_loss(self, step: int, loss: float) -> None:
        self._newest.append(loss)
        self._count, self._step = self._count + 1, step
        if step <= self._best[0]:
            self._loss_at_best = loss
        if self._count < _WINDOW:
            return
        self._mean = statistics.fmean(self._newest)
        if self._count == _WINDOW:
            self._first_mean = self._mean
        if self._mean < self._lowest[1]:
            self._lowest = (step, self._mean)

    def _take_eval(self, step: int, loss: float) -> None:
        self._evals.append(loss)
        if loss < self._best[1]:
            self._best = (step, loss)
            self._loss_at_best = self._newest[-1] if self._newest else None

    def _diverges(self) -> tuple[str, str]:
        step, lowest = self._lowest
        if self._count < 2 * _WINDOW or self._mean <= _DIVERGED * lowest:
            return "diverges", ""
        return "diverges", (
            f"warning: the loss diverges: {lowest:.3g} around step {step}, "
            f"{self._mean:.3g} now. The usual cause is a learning_rate too high "
            f"({self._peak_rate:g}): lower it, raise warmup_steps, or lower "
            "max_grad_norm"
        )

    def _stands_still(self) -> tuple[str, str]:
        first, last = self._first_mean, self._mean
        is_early = self._count < _RECORDS_TO_JUDGE
        if is_early or abs(first - last) > _FLAT * abs(first):
            return "flat", ""
        return "flat", (
            f"warning: the loss does not move: {first:.4g} at first, {last:.4g} at "
            f"step {self._step}. The usual causes are a learning_rate too low "
            f"({self._peak_rate:g}) or trained tokens that cannot be predicted: look "
            "at what is trained (train_on, the chat template)"
        )

    def _overfits(self, step: int) -> tuple[str, str]:
        if len(self._evals) < _EVALS_TO_JUDGE or self._loss_at_best is None:
            return "overfits", ""
        third, second, newest = self._evals
        falls = self._newest[-1] < self._loss_at_best
        if not (third < second < newest and falls):
            return "overfits", ""
        best_step, best = self._best
        return "overfits", (
            f"warning: the run overfits: eval_loss rose to {newest:.4g} at step {step} "
            f"from {best:.4g} at step {best_step}, while the training loss falls. Stop "
            "there (early_stopping_patience, load_best_model_at_end), train fewer "
            "epochs, or add data or lora_dropout"
        )
