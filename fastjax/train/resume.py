"""Finds the checkpoint to go on from, and refuses one of another run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastjax import files
from fastjax.config import TrainConfig
from fastjax.errors import ConfigError, ModelError, printable
from fastjax.remat import RematPlan
from fastjax.train import checkpoint, manifest, metrics, record

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A whole checkpoint.

    Attributes:
      folder: Where it is.
      record: Its `trainer_state.json`.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.record["step"]


def find(output_dir: Path, mode: str, note: Note) -> Found | None:
    """Returns the checkpoint to continue, None to start at step 0.

    Args:
      output_dir: Of the run; its lock is held.
      mode: "auto" takes the newest whole checkpoint and puts broken newer ones aside;
        "no" puts all aside; a path is that checkpoint.
      note: Is told what was put aside and why.

    Raises:
      ModelError: The given path is broken, or every checkpoint is.
    """
    if mode == "no":
        _set_aside_after(output_dir, -1, note)
        for name in (metrics.NAME, metrics.SAMPLES_NAME):
            if (output_dir / name).exists():
                files.set_aside(output_dir / name, "old")
        return None
    if mode == "auto":
        return _newest(output_dir, note)
    found = named(mode)
    _set_aside_after(output_dir, found.step, note)
    return found


def chosen(output_dir: Path, mode: str) -> Path | None:
    """Returns the folder that `find` would take; touches nothing.

    Raises:
      ModelError: The given path is broken.
    """
    if mode == "no":
        return None
    if mode != "auto":
        return named(mode).folder
    newest_first = reversed(checkpoint.checkpoints(output_dir))
    return next((f for f in newest_first if isinstance(_opened(f), Found)), None)


def named(path: str) -> Found:
    """Returns the checkpoint of that path.

    Raises:
      ModelError: It is missing or broken.
    """
    found = _opened(Path(path))
    if isinstance(found, Found):
        return found
    raise ModelError(
        f"the checkpoint cannot be used: {found}",
        where=path,
        fix="give another one, or resume_from_checkpoint=auto for the newest whole",
        code="FJ-MODEL-CHECKPOINT",
    )


def require_same_run(
    found: Found,
    config: TrainConfig,
    identity: Mapping[str, Any],
    note: Note,
    *,
    remat: RematPlan | None = None,
) -> None:
    """Returns when the checkpoint is one of this very run, or changes are allowed.

    Args:
      found: The checkpoint.
      config: Of this run.
      identity: From `record.identity`.
      note: Is told of what may change the last bits.
      remat: Plan of this run.

    Raises:
      ConfigError: Settings that change the mathematics differ; lists them.
    """
    changed = record.differences(found.record.get("identity", {}), identity)
    if changed and not config.allow_config_change:
        raise ConfigError(
            f"{found.folder.name} belongs to a run with other settings",
            where=f"{found.folder}\n{_table(changed)}",
            fix="use the old settings, another output_dir, or allow_config_change",
            code="FJ-CONFIG-RESUME",
        )
    for name, before, now in changed:
        note(f"changed by request: {name} was {printable(before)}, is {now}")
    here = record.environment(config, remat)
    moved = record.differences(found.record.get("environment", {}), here)
    if moved:
        reasons = ", ".join(f"{n} was {printable(b)}, is {now}" for n, b, now in moved)
        note(f"the continued run is not bit exact because {reasons}")


def _newest(output_dir: Path, note: Note) -> Found | None:
    reasons: list[str] = []
    broken: list[Path] = []
    for folder in reversed(checkpoint.checkpoints(output_dir)):
        if not any(folder.iterdir()):
            folder.rmdir()
            continue
        found = _opened(folder)
        if isinstance(found, Found):
            for path in broken:
                kept = files.set_aside(path, "broken")
                note(f"kept as {kept.name}; going on from {folder.name}")
            return found
        reasons.append(f"{folder.name}: {found}")
        note(f"{folder.name} is broken: {found}")
        broken.append(folder)
    if reasons:
        raise ModelError(
            "no checkpoint of the run is whole",
            where="\n         ".join([str(output_dir), *reasons]),
            fix="resume_from_checkpoint=no starts anew and keeps these folders",
            code="FJ-MODEL-CHECKPOINT",
        )
    return None


def _opened(folder: Path) -> Found | str:
    """Returns the checkpoint, or why it cannot be used."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        if problems := manifest.problems(folder):
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            return "; ".join(problems[:3]) + more
        return Found(folder=folder, record=checkpoint.read_record(folder))
    except ModelError as error:
        return error.what
    except OSError as error:
        return f"a file cannot be read: {error.strerror}"


def _set_aside_after(output_dir: Path, step: int, note: Note) -> None:
    for folder in checkpoint.checkpoints(output_dir):
        if checkpoint.step_of(folder) > step:
            note(f"{folder.name} is kept as {files.set_aside(folder, 'old').name}")


def _table(rows: list[tuple[str, str, str]]) -> str:
    shown = [("setting", "checkpoint", "now"), *rows]
    cut = [[printable(cell, 60) for cell in row] for row in shown]
    widths = [max(len(row[column]) for row in cut) for column in range(3)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cut
    ]
    return "\n".join(f"         {line.rstrip()}" for line in lines)
