"""What a training run is given."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import PyTree

from fastjax.config import TrainConfig
from fastjax.losses import cross_entropy
from fastjax.remat import Remat, RematPlan
from fastjax.train.batches import Loader
from fastjax.train.checkpoint import WriteWeights
from fastjax.train.compiled import CompiledSteps
from fastjax.train.step import LossFunction


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a run is given.

    Attributes:
      config: Settings.
      graphdef: Structure of the model.
      trainable: Its weights that train; the run consumes them.
      frozen: All its other variables.
      train_loader: Batches of shape (A, B, S).
      eval_loader: Batches of the held-out set; None evaluates nothing.
      output_dir: Folder of this run alone.
      remat: What the backward pass recomputes; None where there is none.
      base: Fingerprint of the model's folder: a resumed run must have the same; empty
        when it is not known.
      write_adapter: Writes an adapter's files into a folder; None without one.
      write_model: Writes the whole model as a folder, the result of full fine-tuning;
        None where the adapter is the result.
      loss: Takes what `fastjax.losses.cross_entropy` takes.
      on_exit: Receives the newest weights however the run ends, since the ones it
        was given are gone; unless a failing step took the newest ones with it.
      sampler: Answers the sample prompts with the trainable tree's weights; None has
        none.
      head_is_trainable: The table that gives the logits trains.
      flops_per_token: Of forward and backward pass; 0 when not known.
      resume_command: Continues the run; shown when it is interrupted.
      steps_ahead: Returns the compiled steps for this job, where a thread has made
        them beforehand; None where they are of other shapes.
    """

    config: TrainConfig
    graphdef: nnx.GraphDef
    trainable: PyTree
    frozen: PyTree
    train_loader: Loader
    output_dir: Path
    remat: RematPlan | None = None
    eval_loader: Loader | None = None
    base: str = ""
    write_adapter: WriteWeights | None = None
    write_model: WriteWeights | None = None
    loss: Callable[..., Any] = cross_entropy
    on_exit: Callable[[PyTree], None] | None = None
    sampler: Callable[[PyTree], list[tuple[str, str]]] | None = None
    head_is_trainable: bool = False
    flops_per_token: float = 0.0
    resume_command: str = "the same command"
    steps_ahead: Callable[["Job"], CompiledSteps | None] | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return steps_of_run(self.config, self.train_loader.steps_per_epoch)

    def loss_function(self, loader: Loader, remat: Remat | None) -> LossFunction:
        """Returns the loss of one micro-batch of this loader."""
        return functools.partial(
            self.loss,
            self.graphdef,
            max_segments=loader.max_segments,
            remat=remat,
            head_is_trainable=self.head_is_trainable,
            neftune_noise_alpha=self.config.data.neftune_noise_alpha,
            implementation=self.config.implementations.cross_entropy,
        )


def steps_of_run(config: TrainConfig, steps_per_epoch: int) -> int:
    """Returns the optimiser steps of a whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * steps_per_epoch))
