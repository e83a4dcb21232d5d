"""What a run returns."""

import dataclasses
from typing import Any

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
