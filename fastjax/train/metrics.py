"""`metrics.jsonl`: one JSON object a log step, under Hugging Face's names.

After a resume the file goes on as if the run had never stopped: lines beyond the
resumed step are cut, and what had gathered since the last line comes back with the
checkpoint. Only the fields in `CLOCK_FIELDS` depend on the machine.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastjax import files
from fastjax.train.batches import DeviceBatch

NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"
CLOCK_FIELDS = (
    "tokens_per_second",
    "roofline_share",
    "peak_memory_bytes",
    "time",
    "eval_runtime",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over steps; a step whose update was skipped adds no loss.

    Attributes:
      loss_sum: Of all trained tokens.
      trained_tokens: Tokens that carried loss.
      tokens: Tokens that are not padding, of skipped steps too.
      rows: Rows of the batches, the same.
      steps: Steps.
      skipped_steps: Steps without an update.
    """

    loss_sum: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    rows: int = 0
    steps: int = 0
    skipped_steps: int = 0

    @classmethod
    def of_step(cls, metrics: Mapping[str, float], batch: DeviceBatch) -> "Totals":
        """Returns the sums of one step."""
        kept = not metrics["skipped"]
        trained = int(metrics["num_tokens"]) if kept else 0
        return cls(
            loss_sum=metrics["loss"] * trained if kept else 0.0,
            trained_tokens=trained,
            tokens=batch.num_tokens,
            rows=batch.num_rows,
            steps=1,
            skipped_steps=int(not kept),
        )

    def __add__(self, other: "Totals") -> "Totals":
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(**{n: getattr(self, n) + getattr(other, n) for n in names})

    @property
    def loss(self) -> float:
        """Mean over trained tokens; NaN when there are none, never 0."""
        return self.loss_sum / self.trained_tokens if self.trained_tokens else math.nan


class MetricsLog:
    """Gathers the metrics of steps and writes a line for every `logging_steps`."""

    def __init__(
        self,
        folder: Path,
        *,
        logging_steps: int,
        total_steps: int,
        logging_first_step: bool = False,
    ) -> None:
        self.path = folder / NAME
        self._logs_first = logging_first_step
        self.totals = Totals()
        self._window = Totals()
        self._logging_steps, self._total_steps = logging_steps, total_steps
        self._window_seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of this log; JSON holds floats exactly."""
        return {
            "totals": dataclasses.asdict(self.totals),
            "window": dataclasses.asdict(self._window),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back the sums of a checkpoint."""
        self.totals = Totals(**state["totals"])
        self._window = Totals(**state["window"])

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Cuts the file after the lines of `step`; returns the records that stay."""
        return [json.loads(line) for line in truncate_lines(self.path, step)]

    def add(
        self,
        step: int,
        metrics: Mapping[str, float],
        batch: DeviceBatch,
        *,
        epoch: float,
        seconds: float,
    ) -> dict[str, Any] | None:
        """Takes in a step; returns the record to write when it ends a window.

        Args:
          step: Steps done, this one included.
          metrics: Host copies of the step's metrics.
          batch: What the step was given.
          epoch: Passes over the data, as a fraction.
          seconds: Wall time of the step.
        """
        one = Totals.of_step(metrics, batch)
        self.totals, self._window = self.totals + one, self._window + one
        self._window_seconds += seconds
        is_first = step == 1 and self._logs_first
        if step % self._logging_steps and step != self._total_steps and not is_first:
            return None
        window, elapsed = self._window, self._window_seconds
        self._window, self._window_seconds = Totals(), 0.0
        record = {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": window.loss,
            "grad_norm": metrics["grad_norm"],
            "learning_rate": metrics["learning_rate"],
            "num_tokens": self.totals.tokens,
            "num_trained_tokens": self.totals.trained_tokens,
            "tokens_per_second": window.tokens / max(elapsed, 1e-9),
        }
        if window.skipped_steps:
            record["skipped_steps"] = window.skipped_steps
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line and hands it to the system; NaN and infinity become null."""
        append_line(self.path, record)

    def flush_to_disk(self) -> None:
        """Makes the lines so far survive a power loss."""
        if self.path.exists():
            files.fsync(self.path)


def truncate_lines(path: Path, step: int) -> list[str]:
    """Cuts a file of JSON lines after those of `step`, and a torn last line.

    Returns:
      The lines that stay; none where there is no file.
    """
    if not path.exists():
        return []
    with files.storage_errors(f"write {path.name}", path):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_within(line, step)]
        files.write_atomic(path, "".join(f"{line}\n" for line in kept))
    return kept


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line and hands it to the system."""
    line = json.dumps(finite(record), allow_nan=False)
    with (
        files.storage_errors(f"write {path.name}", path),
        path.open("a", encoding="utf-8") as file,
    ):
        file.write(line + "\n")


def stamped(record: Mapping[str, Any], peak_bytes: int | None) -> dict[str, Any]:
    """Returns the record with the device's peak memory, where known, and the time."""
    peak = {} if peak_bytes is None else {"peak_memory_bytes": peak_bytes}
    return {**record, **peak, "time": round(time.time(), 3)}


def _is_within(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record with None for NaN and infinity, which JSON lacks."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
