"""What a run returns."""

import dataclasses
from typing import Any

from rich.table import Table

from fastjax.terminal import as_html
from fastjax.train.compiled import StepMemory


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """The outcome of a finished run.

    Attributes:
      trainable: Tree of the trained weights.
      step: Optimiser steps done.
      metrics: Hugging Face's names: train_loss, train_runtime (all parts of a run that
        was resumed), train_samples_per_second, train_steps_per_second, epoch,
        num_tokens, num_trained_tokens, and the last eval_* values; None is not finite.
      implementations: Op to the implementations that its calls took.
      memory: Plan of the compiled step; None when nothing was compiled.
      compile_seconds: Time to compile.
      step_seconds: Wall time of each step of this process, the first one included.
      was_finished: The run had ended before; nothing was trained now.
    """

    trainable: Any
    step: int
    metrics: dict[str, float | int | None]
    implementations: dict[str, list[str]]
    memory: StepMemory | None
    compile_seconds: float
    step_seconds: tuple[float, ...]
    was_finished: bool

    def __rich__(self) -> Table:
        """Returns the metrics, a line each."""
        table = Table(title=f"{self.step} steps", show_header=False, box=None)
        for name, value in self.metrics.items():
            table.add_row(name, "-" if value is None else f"{value:,.4g}")
        return table

    def _repr_html_(self) -> str:
        """Returns the same for notebooks."""
        return as_html(self)
