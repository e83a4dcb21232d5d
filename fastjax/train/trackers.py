"""TensorBoard, Weights & Biases, Trackio, MLflow: each metric, also there.

A tracker never stops a run: when one fails it is left out from then on, with one
warning, and `metrics.jsonl` stays complete.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastjax.errors import EnvironmentFault, printable
from fastjax.requirements import install_command

_FAULTS = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What trackers raise beside errors of their own."""


@runtime_checkable
class Tracker(Protocol):
    """One service."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends the numbers of a step."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class TensorBoard:
    """Writes event files into `OUT/tensorboard`."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        folder = str(run.output_dir / "tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=run.step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one scalar a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """Weights & Biases, and Trackio, which has the same calls."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        self._module = module
        extra = {"id": run.name, "dir": str(run.output_dir)}
        module.init(
            project=run.project,
            name=run.name,
            config=dict(run.settings),
            resume="allow",
            **(extra if module.__name__ == "wandb" else {}),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends all numbers at once."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there."""
        self._module.finish()


class MLflow:
    """MLflow, at the address of its own environment variables."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        self._module = module
        module.set_experiment(run.project)
        module.start_run(run_name=run.name)
        module.log_params({name: str(value) for name, value in run.settings.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends all numbers at once."""
        self._module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there."""
        self._module.end_run()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What trackers are told of a run.

    Attributes:
      output_dir: Of the run.
      project: Name of a group of runs.
      name: Of the run, the same again when it is resumed.
      settings: Flat, without secrets: they have none.
      step: Steps done before.
    """

    output_dir: Path
    project: str
    name: str
    settings: Mapping[str, Any]
    step: int


# Name -> (module, adapter, names of the module's own errors).
_KNOWN: dict[str, tuple[str, Callable[[Any, RunInfo], Tracker], tuple[str, ...]]] = {
    "tensorboard": ("tensorboardX", TensorBoard, ()),
    "wandb": ("wandb", WandB, ("Error",)),
    "trackio": ("trackio", WandB, ()),
    "mlflow": ("mlflow", MLflow, ("MlflowException",)),
}


class Trackers:
    """Those of `report_to`, each until it fails."""

    def __init__(
        self, names: Sequence[str], run: RunInfo, note: Callable[[str], None]
    ) -> None:
        """Starts them.

        Raises:
          EnvironmentFault: A package is missing; names the extra that brings it.
        """
        self._note = note
        self._open: dict[str, Tracker] = {}
        self._faults: dict[str, tuple[type[BaseException], ...]] = {}
        modules = {name: _imported(name) for name in names if name != "none"}
        for name, module in modules.items():
            _, make, errors = _KNOWN[name]
            own = tuple(getattr(module, e) for e in errors if hasattr(module, e))
            self._faults[name] = (*_FAULTS, *own)
            try:
                self._open[name] = make(module, run)
            except self._faults[name] as error:
                self._leave_out(name, error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record of `metrics.jsonl`."""
        values = {
            _grouped(name): value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, record["step"])
            except self._faults[name] as error:
                self._leave_out(name, error)

    def close(self) -> None:
        """Ends them all."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.close()
            except self._faults[name] as error:
                self._leave_out(name, error)
        self._open = {}

    def _leave_out(self, name: str, error: BaseException) -> None:
        self._open.pop(name, None)
        self._note(
            f"warning: {name} failed and is left out: {printable(error)}; "
            "metrics.jsonl goes on"
        )


def require_packages(names: Sequence[str]) -> None:
    """Returns when each tracker's package is there.

    Raises:
      EnvironmentFault: One is missing; names the extra that brings it.
    """
    for name in names:
        if name != "none":
            _imported(name)


def _imported(name: str) -> Any:
    module = _KNOWN[name][0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentFault(
            f"report_to={name} needs the package {module}",
            fix=f"{install_command(name)}, or leave {name} out of report_to",
            code="FJ-ENV-EXTRA",
        ) from error


def _grouped(name: str) -> str:
    """Returns the name as Hugging Face's trainer sends it: train/loss, eval/loss."""
    is_eval = name.startswith("eval_")
    return f"eval/{name.removeprefix('eval_')}" if is_eval else f"train/{name}"
