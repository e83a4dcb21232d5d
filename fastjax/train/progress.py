"""What a run says: plain lines, and below them a live one on a terminal."""

import datetime
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from fastjax.terminal import say

COMPILING = "compiling the step (about a minute once per shape)"
_COLUMNS_FOR_BAR = 110


class Progress:
    """Shows steps and notes on a console.

    Args:
      console: Where to; a terminal gets a line that stays in place, with a bar where
        there is room.
      total_steps: Steps of the whole run.
    """

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._status = ""
        self._started, self._first_step = time.monotonic(), 0

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            # The counter is what a narrow terminal keeps.
            width = 2 * len(str(self._total_steps)) + 1
            counter = MofNCompleteColumn(
                table_column=Column(no_wrap=True, min_width=width)
            )
            is_wide = self._console.width >= _COLUMNS_FOR_BAR
            bar = RichProgress(
                counter,
                *((BarColumn(bar_width=20),) if is_wide else ()),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )
            self._task = bar.add_task("", total=self._total_steps, status="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Says one thing that stays on the screen."""
        say(self._console, text)

    def start(self, step: int) -> None:
        """Starts the clock of the remaining time at this step."""
        self._started, self._first_step = time.monotonic(), step
        self._show(step)

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._show(step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows a line of metrics, which stays, and its most important ones live."""
        step = record["step"]
        remaining = f"ETA {self._remaining(step)}"
        self._status = "  ".join([*_brief(record), remaining])
        line = "  ".join([*_parts(record), remaining])
        self.note(f"step {step}/{self._total_steps}  {line}")
        self._show(step)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the result of an evaluation."""
        loss, perplexity = metrics["eval_loss"], metrics["eval_perplexity"]
        self.note(
            f"step {step}/{self._total_steps}  eval_loss {loss:.4f}  "
            f"eval_perplexity {perplexity:.4g}  ({metrics['eval_runtime']:.1f} s)"
        )

    def sample(self, prompt: str, answer: str) -> None:
        """Shows an answer; control characters of the model reach no terminal."""
        for mark, text in (("> ", prompt), ("  ", answer)):
            shown = "".join(c if c.isprintable() else " " for c in text)
            self.note(mark + (shown if len(shown) <= 300 else f"{shown[:297]}..."))

    def _show(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, status=self._status)

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        if done < 1:
            return "?"
        seconds = (time.monotonic() - self._started) / done * (self._total_steps - step)
        return str(datetime.timedelta(seconds=math.ceil(seconds)))


def _brief(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        f"epoch {record['epoch']:.2f}",
        f"loss {record['loss']:.4f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    )


def _parts(record: Mapping[str, Any]) -> list[str]:
    epoch, loss, speed = _brief(record)
    parts = [
        epoch,
        loss,
        f"grad_norm {record['grad_norm']:.3g}",
        f"lr {record['learning_rate']:.3g}",
        speed,
    ]
    if "roofline_share" in record:
        parts.append(f"{record['roofline_share']:.1%} of roofline")
    if "peak_memory_bytes" in record:
        parts.append(f"peak {record['peak_memory_bytes'] / 2**30:.2f} GiB")
    return parts
