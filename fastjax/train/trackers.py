"""TensorBoard, Weights & Biases, Trackio, MLflow: each metric, also there.

A tracker that fails is left out from then on, with one warning, and `metrics.jsonl`
stays complete: none stops a run, unless the host's memory is at its end.
"""

import contextlib
import dataclasses
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastjax.errors import EnvironmentFault, printable
from fastjax.requirements import install_command

_PARAMS_A_CALL = 100  # as many as MLflow takes


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
    """Weights & Biases, beside other runs of the process."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        self._run = module.init(
            project=run.project,
            name=run.name,
            id=run.id,
            dir=str(run.output_dir),
            config=dict(run.settings),
            resume="allow",
            reinit="create_new",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends all numbers at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


class Trackio(WandB):
    """Trackio, which tells runs apart by their names alone."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        self._run = module.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config=dict(run.settings),
            resume="allow",
        )


class MLflow:
    """MLflow, at the address of its own environment variables."""

    def __init__(self, module: Any, run: "RunInfo") -> None:
        self._entities, self._client = module.entities, module.MlflowClient()
        experiment = self._experiment(run.project)
        # A run there has an id of the server's making; ours is a tag.
        same = f"tags.fastjax_id = '{run.id}'"
        found = self._client.search_runs([experiment], same) if run.step else []
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(
            experiment, run_name=run.name, tags={"fastjax_id": run.id}
        )
        self._id = made.info.run_id
        for some in itertools.batched(run.settings.items(), _PARAMS_A_CALL):
            params = [self._entities.Param(name, str(value)) for name, value in some]
            self._client.log_batch(self._id, params=params)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends all numbers at once."""
        now = round(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Ends the run there."""
        self._client.set_terminated(self._id)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What trackers are told of a run.

    Attributes:
      output_dir: Of the run.
      project: Name of a group of runs.
      id: Drawn when the run started: the same again when it is resumed, and that of no
        other run.
      name: For people; several runs may share it.
      settings: Flat, without secrets: they have none.
      step: Steps done before.
    """

    output_dir: Path
    project: str
    id: str
    name: str
    settings: Mapping[str, Any]
    step: int


# Name -> (module, adapter).
_KNOWN: dict[str, tuple[str, Callable[[Any, RunInfo], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", MLflow),
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
        modules = {name: _imported(name) for name in names if name != "none"}
        for name, module in modules.items():
            with self._leaving_out(name):
                self._open[name] = _KNOWN[name][1](module, run)

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record of `metrics.jsonl`."""
        values = {
            _grouped(name): float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            with self._leaving_out(name):
                tracker.log(values, record["step"])

    def close(self) -> None:
        """Ends them all."""
        for name, tracker in list(self._open.items()):
            with self._leaving_out(name):
                tracker.close()
        self._open = {}

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        """Leaves a tracker out when the block fails."""
        try:
            yield
        except Exception as error:
            # Services and what carries to them share no error; some raise a plain one.
            if not isinstance(error, MemoryError):
                self._open.pop(name, None)
                self._note(
                    f"warning: {name} failed and is left out: {printable(error)}; "
                    "metrics.jsonl goes on"
                )
                return
            raise


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
