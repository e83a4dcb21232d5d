"""What a run tells of itself: to file, terminal, trackers and plot."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fastjax.config import TrainConfig
from fastjax.train import loss_plot, record
from fastjax.train.job import Job
from fastjax.train.metrics import (
    SAMPLES_NAME,
    MetricsLog,
    append_line,
    finite,
    stamped,
    truncate_lines,
)
from fastjax.train.progress import Progress
from fastjax.train.throughput import roofline_share
from fastjax.train.trackers import RunInfo, Trackers
from fastjax.train.watchdog import Watchdog


class Reporter:
    """Passes each record of a run on; `metrics.jsonl` comes first.

    Attributes:
      log: The metrics file and its sums.
      run_id: Of the run in the trackers; it stays when the run is resumed.
    """

    def __init__(
        self, job: Job, progress: Progress, *, step: int, run_id: str | None = None
    ) -> None:
        """Cuts what lies beyond `step`, and goes on from there.

        Args:
          job: Of the run.
          progress: Shows it.
          step: Steps done before.
          run_id: Of the run that goes on; None draws one for a run that starts.

        Raises:
          EnvironmentFault: A tracker's package is missing.
        """
        config = job.config
        self._job, self._progress = job, progress
        self.run_id = run_id or secrets.token_hex(8)
        self.log = MetricsLog(
            job.output_dir,
            logging_steps=config.logging_steps,
            total_steps=job.total_steps,
            logging_first_step=config.logging_first_step,
        )
        # A run at step 0 evaluates again what it may have evaluated at the start.
        last = step or -1
        self._records = self.log.truncate(last)
        truncate_lines(job.output_dir / SAMPLES_NAME, last)
        self._watchdog = Watchdog(config.optimizer.learning_rate)
        self._watchdog.replay(self._records)
        info = _run_info(config, job.output_dir, step, self.run_id)
        self._trackers = Trackers(config.report.report_to, info, self.note)
        self._device_kind = jax.local_devices()[0].device_kind

    def note(self, text: str) -> None:
        """Says one thing that stays on the screen."""
        self._progress.note(text)

    def metrics(self, entry: Mapping[str, Any], peak_bytes: int | None) -> None:
        """Takes in the record of a window of steps."""
        share = roofline_share(
            entry["tokens_per_second"], self._job.flops_per_token, self._device_kind
        )
        known = {} if share is None else {"roofline_share": share}
        entry = stamped({**entry, **known}, peak_bytes)
        self._progress.record(entry)
        self._pass_on(entry)

    def evaluation(self, step: int, epoch: float, result: Mapping[str, float]) -> None:
        """Takes in an evaluation."""
        self._progress.evaluation(step, result)
        self._pass_on({"step": step, "epoch": round(epoch, 6), **result})

    def samples(self, step: int, pairs: list[tuple[str, str]]) -> None:
        """Keeps answers in `samples.jsonl` and shows the first."""
        for prompt, answer in pairs:
            line = {"step": step, "prompt": prompt, "answer": answer}
            append_line(self._job.output_dir / SAMPLES_NAME, line)
        self._progress.sample(*pairs[0])

    def plot(self) -> None:
        """Draws the loss so far."""
        loss_plot.write_loss_plot(self._job.output_dir, self._records)

    def close(self) -> None:
        """Lets the trackers send what is left."""
        self._trackers.close()

    def _pass_on(self, entry: Mapping[str, Any]) -> None:
        self.log.write(entry)
        kept = finite(entry)
        self._records.append(kept)
        self._trackers.log(kept)
        for warning in self._watchdog.observe(kept):
            self.note(warning)


def _run_info(config: TrainConfig, output_dir: Path, step: int, run_id: str) -> RunInfo:
    return RunInfo(
        output_dir=output_dir,
        project=config.report.project,
        id=run_id,
        name=config.report.run_name or output_dir.name,
        settings=record.settings(config),
        step=step,
    )
