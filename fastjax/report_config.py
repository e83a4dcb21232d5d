"""What a run shows, which weights it keeps, and where it publishes them."""

import dataclasses
import math
from typing import Literal

from fastjax.config_rules import Number, keep_floats, require

Tracker = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a run shows, which weights it keeps, and where it publishes them.

    Attributes:
      report_to: Trackers that get the numbers of `metrics.jsonl` too, several with
        commas between; each needs its package, `fastjax[wandb]` for wandb.
      project: Group of runs in the trackers.
      run_name: Name in the trackers; runs of one name stay apart there. None takes that
        of the folder.
      sample_prompts: Text file, a prompt a line, answered at each evaluation.
      sample_max_new_tokens: Most tokens of such an answer.
      eval_on_start: Evaluate before the first step too.
      load_best_model_at_end: The best evaluation's weights are the result; its
        checkpoint is kept.
      metric_for_best_model: What the best is measured by; smaller is better.
      early_stopping_patience: Evaluations without a better one that end the run; 0
        never ends it early.
      early_stopping_threshold: By how much an evaluation must be better to count.
      on_save_error: "continue" goes on without a checkpoint when the disk is full.
      fallback_dir: Gets the adapter when the output folder cannot be written; None
        takes the system's temporary folder.
      push_to_hub: Upload the result to `hub_model_id` when the run is finished.
      hub_model_id: Repository on the Hugging Face hub, such as me/my-adapter.
      hub_private_repo: Make that repository private, if it is new.
    """

    report_to: tuple[Tracker, ...] = ()
    project: str = "fastjax"
    run_name: str | None = None
    sample_prompts: str | None = None
    sample_max_new_tokens: int = 64
    eval_on_start: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["eval_loss", "eval_perplexity"] = "eval_loss"
    early_stopping_patience: int = 0
    early_stopping_threshold: Number = 0.0
    on_save_error: Literal["stop", "continue"] = "stop"
    fallback_dir: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False

    def __post_init__(self) -> None:
        keep_floats(self)
        threshold = self.early_stopping_threshold
        require(
            self,
            sample_max_new_tokens=(self.sample_max_new_tokens >= 1, "at least 1"),
            early_stopping_patience=(self.early_stopping_patience >= 0, "0 or more"),
            early_stopping_threshold=(
                math.isfinite(threshold) and threshold >= 0,
                "0 or more",
            ),
            push_to_hub=(
                not self.push_to_hub or bool(self.hub_model_id),
                "given together with hub_model_id",
            ),
        )
