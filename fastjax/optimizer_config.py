"""How gradients become updates: optimiser, learning rate and its schedule."""

import dataclasses
import math
from typing import Literal

from fastjax.config_rules import Number, is_positive, keep_floats, require

Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"
]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "lion", "sgd"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      optim: "adamw" keeps two float32 numbers a trained weight (1711.05101),
        "adamw_8bit" two bytes (2110.02861), "lion" one number (2302.06675), "adafactor"
        sums of rows and columns (1804.04235), "sgd" none.
      learning_rate: At its peak. Adapters take 1e-4 to 2e-4, full fine-tuning a tenth.
      embedding_learning_rate: Of embeddings and output head where these train; 0 is
        `learning_rate`.
      lr_scheduler_type: How the learning rate goes on after the warmup: down to 0 in a
        line or half a cosine, to a tenth of its peak ("cosine_with_min_lr"), or not at
        all.
      warmup_steps: Steps of rising learning rate; below 1, a share of all steps.
      weight_decay: Share of a weight that a step takes off, times the learning rate.
      adam_beta1: Share of the mean gradient that a step keeps.
      adam_beta2: Share of the mean squared gradient that a step keeps.
      adam_epsilon: Is added to the root of the latter, which the update is divided by.
      offload_optimizer: The optimiser's states wait in host memory between their
        updates, for full fine-tuning; copies of them lengthen each step.
      max_grad_norm: A gradient whose norm is larger is scaled down to it; 0 never does.
    """

    optim: Optimizer = "adamw"
    learning_rate: Number = 2e-4
    embedding_learning_rate: Number = 0.0
    lr_scheduler_type: Schedule = "linear"
    warmup_steps: Number = 0.03
    weight_decay: Number = 0.0
    adam_beta1: Number = 0.9
    adam_beta2: Number = 0.999
    adam_epsilon: Number = 1e-8
    offload_optimizer: bool = False
    max_grad_norm: Number = 1.0

    def __post_init__(self) -> None:
        keep_floats(self)
        shares = {
            name: (0 <= getattr(self, name) < 1, "in [0, 1)")
            for name in ("adam_beta1", "adam_beta2")
        }
        amounts = {
            name: (math.isfinite(value) and value >= 0, "0 or more")
            for name in ("warmup_steps", "weight_decay", "max_grad_norm")
            for value in [getattr(self, name)]
        }
        require(
            self,
            learning_rate=(is_positive(self.learning_rate), "a positive number"),
            embedding_learning_rate=(
                0 <= self.embedding_learning_rate < math.inf,
                "0 or more",
            ),
            adam_epsilon=(is_positive(self.adam_epsilon), "a positive number"),
            offload_optimizer=(
                not self.offload_optimizer or self.optim != "adafactor",
                "false with adafactor, whose updates need whole arrays",
            ),
            **shares,
            **amounts,
        )
