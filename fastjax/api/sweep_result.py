"""What a sweep found: its adapters, the best first."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastjax import files
from fastjax.api.sweep_plan import SweepRun
from fastjax.terminal import as_html, whole_width
from fastjax.train.publish import RUN_FILE

RESULT_FILE = "sweep.json"
_METRICS = ("eval_loss", "train_loss")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepEntry:
    """One adapter.

    Attributes:
      name: Made of its changes.
      changes: Fields and their values.
      folder: Where it is.
      metrics: As `TrainResult.metrics`; the losses are None where they diverged.
    """

    name: str
    changes: dict[str, Any]
    folder: Path
    metrics: dict[str, float | int | None]

    @classmethod
    def read(cls, run: SweepRun) -> "SweepEntry":
        """Returns what the folder of a run says."""
        found = files.read_json(run.folder / RUN_FILE)
        return cls(
            name=run.name,
            changes=run.changes,
            folder=run.folder,
            metrics=found["metrics"],
        )

    @property
    def loss(self) -> float:
        """Held-out loss, or that of training without one; NaN is the worst of all."""
        losses = [self.metrics.get(name, math.nan) for name in _METRICS]
        known = [loss for loss in losses if loss is None or not math.isnan(loss)]
        return math.inf if not known or known[0] is None else float(known[0])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """The adapters of a sweep; prints itself with rich.

    Attributes:
      entries: The one of the lowest loss first.
    """

    entries: tuple[SweepEntry, ...]

    @classmethod
    def of(cls, entries: Sequence[SweepEntry]) -> "SweepResult":
        """Returns the result of adapters in any order."""
        return cls(entries=tuple(sorted(entries, key=lambda entry: entry.loss)))

    @property
    def best(self) -> SweepEntry:
        """The adapter of the lowest loss."""
        return self.entries[0]

    def as_json(self) -> dict[str, Any]:
        """Returns all of it, as JSON holds it."""
        return {
            "adapters": [
                dataclasses.asdict(entry) | {"folder": str(entry.folder)}
                for entry in self.entries
            ]
        }

    def __rich__(self) -> Table:
        """Returns a table of changes and losses."""
        table = Table(box=None)
        names = list(dict.fromkeys(n for e in self.entries for n in e.changes))
        for name in (*names, *_METRICS, "folder"):
            table.add_column(name, justify="right" if name in _METRICS else "left")
        for entry in self.entries:
            losses = [entry.metrics.get(name) for name in _METRICS]
            table.add_row(
                *(str(entry.changes.get(name, "")) for name in names),
                *("-" if loss is None else f"{loss:.4f}" for loss in losses),
                str(entry.folder),
            )
        return table

    def _repr_html_(self) -> str:
        """Returns the same for notebooks."""
        return as_html(self, width=whole_width(self))
