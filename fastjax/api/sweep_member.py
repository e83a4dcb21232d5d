"""One adapter among those that train together: its log, and what it becomes."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import PyTree
from rich.console import Console

from fastjax import files
from fastjax.api.language_model import LanguageModel
from fastjax.api.loading import add_adapter
from fastjax.api.model_card import write_model_card
from fastjax.api.result_writers import adapter_writer
from fastjax.api.run_folder import write_settings
from fastjax.api.sweep_plan import SweepRun
from fastjax.train import CompiledSteps, Job, TrainResult, record
from fastjax.train.batches import DeviceBatch
from fastjax.train.compiled import device_bytes
from fastjax.train.evaluate import EvalResult
from fastjax.train.health import BAD_STEPS_TO_STOP, bad_steps_in_row, require_gradient
from fastjax.train.metrics import finite
from fastjax.train.progress import Progress
from fastjax.train.publish import publish_adapter, write_run_file
from fastjax.train.reporter import Reporter


class SweepMember:
    """Follows one adapter from step to step.

    Attributes:
      run: Its settings.
      job: What it trains on.
      diverged_at: Step at which its numbers were not finite any more; 0 while they are.
    """

    def __init__(self, run: SweepRun, job: Job, console: Console) -> None:
        files.make_folder(run.folder)
        self._progress = _Named(run.name, console, job.total_steps)
        self.run, self.job, self.diverged_at = run, job, 0
        self._reporter = Reporter(job, self._progress, step=0)
        self._bad_steps = 0
        self._last_eval: dict[str, float | None] = {}

    def start(self) -> None:
        """Starts the clock of the remaining time."""
        self._progress.start(0)

    def observe(
        self,
        step: int,
        metrics: Mapping[str, float],
        batch: DeviceBatch,
        *,
        seconds: float,
    ) -> None:
        """Takes in a step.

        Raises:
          ConfigError: The first gradient is exactly 0.
        """
        if self.diverged_at:
            return
        if step == 1:
            require_gradient(metrics)
        self._bad_steps = bad_steps_in_row(metrics, self._bad_steps)
        if self._bad_steps >= BAD_STEPS_TO_STOP:
            self.diverged_at = step
            self._reporter.note(f"diverged at step {step}; the others go on")
        entry = self._reporter.log.add(
            step, metrics, batch, epoch=self._epoch(step), seconds=seconds
        )
        if entry is not None:
            self._reporter.metrics(entry, device_bytes("peak_bytes_in_use"))

    def evaluated(self, step: int, result: EvalResult) -> None:
        """Takes in an evaluation."""
        if not self.diverged_at:
            metrics = result.metrics()
            self._reporter.evaluation(step, self._epoch(step), metrics)
            self._last_eval = finite(metrics)

    def publish(
        self,
        base: LanguageModel,
        trainable: PyTree,
        steps: CompiledSteps,
        *,
        seconds: float,
    ) -> None:
        """Writes the folder of the result; that of a diverged one holds no adapter.

        Args:
          base: Model without an adapter.
          trainable: Weights of the adapter.
          steps: That trained it.
          seconds: That the group took.
        """
        folder, config = self.run.folder, self.run.config
        result = self._result(trainable, steps, seconds)
        if not self.diverged_at:
            plain = dataclasses.replace(config.lora, init_lora_weights="default")
            adapted = copy.copy(base)
            add_adapter(adapted, plain, seed=0)
            adapted.lora = config.lora
            write_adapter = adapter_writer(adapted)
            assert write_adapter is not None
            publish_adapter(folder, trainable, write_adapter)
            data = self.job.train_loader.fingerprint
            write_model_card(folder, adapted, config, result, data=data)
        self._reporter.plot()
        write_settings(folder / "config.yaml", config)
        write_run_file(folder, self._description(result))

    def close(self) -> None:
        """Lets the trackers send what is left."""
        self._reporter.close()

    def _epoch(self, step: int) -> float:
        return step / max(1, self.job.train_loader.steps_per_epoch)

    def _result(
        self, trainable: nnx.State, steps: CompiledSteps, seconds: float
    ) -> TrainResult:
        totals = self._reporter.log.totals
        metrics = {
            "train_runtime": seconds,
            "train_loss": totals.loss,
            "epoch": self._epoch(totals.steps),
            "num_tokens": totals.tokens,
            "num_trained_tokens": totals.trained_tokens,
            **self._last_eval,
        }
        if self.diverged_at:  # what an evaluation found before must not win
            stale = [n for n in metrics if n.endswith(("_loss", "_perplexity"))]
            metrics |= dict.fromkeys(stale)
        return TrainResult(
            trainable=trainable,
            step=totals.steps,
            metrics=finite(metrics),
            implementations=steps.implementations,
            memory=steps.memory,
            compile_seconds=steps.compile_seconds,
            step_seconds=(),
            was_finished=False,
        )

    def _description(self, result: TrainResult) -> dict[str, Any]:
        config, memory = self.run.config, result.memory
        return {
            "is_finished": True,
            "diverged_at": self.diverged_at or None,
            "total_steps": self.job.total_steps,
            "steps_done": result.step,
            "data": self.job.train_loader.fingerprint,
            "settings": record.settings(config),
            "environment": record.environment(config, self.job.remat),
            "implementations": result.implementations,
            "memory": None if memory is None else dataclasses.asdict(memory),
            "compile_seconds": result.compile_seconds,
            "metrics": result.metrics,
        }


class _Named(Progress):
    """Says whose each line is."""

    def __init__(self, name: str, console: Console, total_steps: int) -> None:
        super().__init__(console, total_steps)
        self._name = name

    def note(self, text: str) -> None:
        """Says one thing of this adapter."""
        super().note(f"{self._name}: {text}")
