"""Best weights, warnings, trackers and the plot: what follows the metrics of a run."""

import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fastjax.config import ReportConfig
from fastjax.errors import ConfigError, EnvironmentFault
from fastjax.flat_config import train_config
from fastjax.train.loss_plot import loss_svg, smoothed, write_loss_plot
from fastjax.train.selection import Selection
from fastjax.train.throughput import roofline_share
from fastjax.train.trackers import RunInfo, Trackers
from fastjax.train.watchdog import Watchdog


def observed(selection: Selection, losses: list[float]) -> list[bool]:
    steps = enumerate(losses, start=1)
    return [selection.observe(step, {"eval_loss": loss}) for step, loss in steps]


def test_the_best_evaluation_is_known_and_patience_ends() -> None:
    selection = Selection(config=ReportConfig(early_stopping_patience=2))
    assert observed(selection, [3.0, 2.0, 2.5]) == [True, True, False]
    assert (selection.best_step, selection.should_stop) == (2, False)
    again = Selection(config=selection.config)
    again.restore(selection.state())
    assert not again.observe(4, {"eval_loss": float("nan")})
    assert again.should_stop
    other = Selection(config=ReportConfig(metric_for_best_model="eval_perplexity"))
    other.restore(selection.state())
    assert other.best is None


def test_a_gain_below_the_threshold_is_the_best_and_no_progress() -> None:
    config = ReportConfig(early_stopping_patience=1, early_stopping_threshold=0.5)
    selection = Selection(config=config)
    assert observed(selection, [3.0, 2.9]) == [True, True]
    assert selection.should_stop


def warnings_of(losses: list[float], evals: list[tuple[int, float]] = ()) -> list[str]:
    watchdog, found = Watchdog(2e-4), []
    for step, loss in enumerate(losses, start=1):
        found += watchdog.observe({"step": step, "loss": loss})
        for at, value in evals:
            if at == step:
                found += watchdog.observe({"step": step, "eval_loss": value})
    return found


@pytest.mark.parametrize(
    ("losses", "evals", "expected"),
    [
        ([3.0 - 0.05 * i for i in range(40)], [(10, 3.0), (20, 2.0), (30, 1.9)], None),
        ([3 - 0.2 * i for i in range(8)] + [4.0] * 12, [], "diverges"),
        ([2.3 + 0.001 * (-1) ** i for i in range(40)], [], "does not move"),
        (
            [3.0 - 0.05 * i for i in range(40)],
            [(10, 2.0), (20, 2.1), (30, 2.3)],
            "overfits",
        ),
        ([3.0, None, 2.0], [], None),
    ],
)
def test_warnings_name_the_cause_once(losses, evals, expected) -> None:
    found = warnings_of(losses, evals)
    assert [expected in text for text in found] == ([True] if expected else [])
    assert not found or "learning_rate" in found[0] or "early_stopping" in found[0]


def test_what_is_watched_does_not_grow_with_the_run() -> None:
    sizes = []
    for records in (100, 1000):
        watchdog = Watchdog(2e-4)
        for step in range(1001, 1001 + records):
            watchdog.observe({"step": step, "loss": 2.0 + 1 / step})
            watchdog.observe({"step": step, "eval_loss": 2.5 + 1 / step})
        sizes.append(len(pickle.dumps(watchdog)))
    assert sizes[1] <= sizes[0] + 4


def test_the_plot_shows_both_losses(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 3 - s / 2000} for s in range(1, 4001)]
    records += [{"step": 2000, "eval_loss": 1.9}, {"step": 4000, "eval_loss": 1.2}]
    root = ElementTree.fromstring(loss_svg(records))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3
    assert max(len(line.get("points").split()) for line in lines) < 3000
    assert loss_svg([{"step": 1, "loss": None}]) == ""
    assert "circle" in loss_svg([{"step": 1, "eval_loss": 2.0}])
    write_loss_plot(tmp_path, [])
    assert not list(tmp_path.iterdir())
    averages = [value for _, value in smoothed([(float(s), 2.0) for s in range(100)])]
    assert averages == pytest.approx([2.0] * 100)


def test_the_share_of_the_roofline() -> None:
    assert roofline_share(1e4, 4 * 7.5e9, "NVIDIA H200") == pytest.approx(0.303, 0.01)
    assert roofline_share(1e4, 0.0, "NVIDIA H200") is None
    assert roofline_share(1e4, 1.0, "cpu") is None


class FakeTracker(types.ModuleType):
    """Stands for wandb and trackio; each run has calls of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[FakeRun] = []

    def init(self, **options: object) -> "FakeRun":
        self.runs.append(FakeRun(options))
        return self.runs[-1]


class FakeRun:
    """A run of one of these."""

    def __init__(self, options: dict) -> None:
        self.options = options
        self.calls: list[tuple] = []

    def log(self, values: dict, step: int) -> None:
        if step == 3:
            raise Exception("no route to host")
        self.calls.append((values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


class FakeMLflow(types.ModuleType):
    """Stands for mlflow, its client and its entities."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = types.SimpleNamespace(
            Param=lambda name, value: (name, value),
            Metric=lambda name, value, time, step: (name, value, step),
        )
        self.runs: dict[str, list] = {}
        self.tags: dict[str, str] = {}

    def MlflowClient(self) -> "FakeMLflow":  # noqa: N802
        return self

    def get_experiment_by_name(self, name: str) -> None: ...

    def create_experiment(self, name: str) -> str:
        return f"experiment-{name}"

    def create_run(self, experiment: str, run_name: str, tags: dict) -> object:
        name = f"{experiment}/{run_name}/{len(self.runs)}"
        self.runs[name], self.tags[name] = [], tags["fastjax_id"]
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

    def search_runs(self, experiments: list[str], query: str) -> list:
        return [
            types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))
            for name, tag in self.tags.items()
            if f"'{tag}'" in query
        ]

    def update_run(self, name: str, status: str) -> None:
        self.runs[name].append(status)

    def log_batch(self, name: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[name] += [*metrics, *params]

    def set_terminated(self, name: str) -> None:
        self.runs[name].append("FINISHED")


class FakeBoard(types.ModuleType):
    """Stands for tensorboardX."""

    def __init__(self) -> None:
        super().__init__("tensorboardX")
        self.calls: list[tuple] = []
        calls = self.calls

        class SummaryWriter:
            def __init__(self, folder: str, purge_step: int) -> None:
                calls.append((Path(folder).name, purge_step))

            def add_scalar(self, *entry: object) -> None:
                calls.append(entry)

            def flush(self) -> None: ...

            def close(self) -> None: ...

        self.SummaryWriter = SummaryWriter


def test_trackers_get_the_numbers_and_one_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, board, mlflow = FakeTracker("wandb"), FakeBoard(), FakeMLflow()
    for module in (wandb, board, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    notes: list[str] = []
    names = ("none", "wandb", "tensorboard", "mlflow")
    trackers = Trackers(names, run_info(tmp_path, step=2), notes.append)
    for step in (2, 3, 4):
        trackers.log({"step": step, "loss": 1.5, "eval_loss": 2.0, "time": None})
    trackers.close()
    assert wandb.runs[0].options["resume"] == "allow"
    assert wandb.runs[0].calls == [({"train/loss": 1.5, "eval/loss": 2.0}, 2)]
    assert board.calls[0] == ("tensorboard", 3)
    assert ("train/loss", 1.5, 4) in board.calls
    (calls,) = mlflow.runs.values()
    assert calls[:2] == [("seed", "1"), ("train/loss", 1.5, 2)]
    assert len(calls) == 8
    assert calls[-1] == "FINISHED"
    assert len(notes) == 1
    assert "wandb failed" in notes[0]


def test_a_failed_assertion_of_a_tracker_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise AssertionError("no service")

    module = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    notes: list[str] = []
    Trackers(("wandb",), run_info(tmp_path), notes.append).close()
    assert ["wandb failed" in note for note in notes] == [True]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_runs_of_one_name_stay_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeMLflow() if name == "mlflow" else FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, module)
    both = [
        Trackers((name,), run_info(tmp_path, id=place), print) for place in ("x", "y")
    ]
    for value, trackers in enumerate(both):
        trackers.log({"step": 1, "loss": value})
    for trackers in both:
        trackers.close()
    if isinstance(module, FakeTracker):
        losses = [run.calls[0][0]["train/loss"] for run in module.runs]
        key = "id" if name == "wandb" else "name"
        assert len({run.options[key] for run in module.runs}) == 2
    else:
        losses = [calls[1][1] for calls in module.runs.values()]
    assert losses == [0, 1]


def test_a_resumed_run_goes_on_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for step, place in ((0, "x"), (0, "y"), (5, "x")):
        trackers = Trackers(("mlflow",), run_info(tmp_path, id=place, step=step), print)
        trackers.log({"step": step + 1, "loss": 1.0})
        trackers.close()
    first, second = module.runs.values()
    assert ("train/loss", 1.0, 6) in first
    assert len(second) == 3


def test_a_resumed_run_keeps_its_id_and_a_new_one_has_its_own(
    tiny: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = tmp_path / "a"

    def train(output_dir: Path = folder, mode: str = "auto", **options: str) -> None:
        options["resume_from_checkpoint"] = mode
        tiny.train(output_dir, report_to=("wandb",), **options)

    train()
    shutil.rmtree(folder / "checkpoint-000008")
    train()
    train()
    train(mode="no")
    train(tmp_path / "b", str(folder / "checkpoint-000006"), run_name="same")
    shutil.rmtree(folder)
    train(run_name="same")
    told = [run.options for run in module.runs]
    assert [run["name"] for run in told] == ["a", "a", "a", "a", "same", "same"]
    first, *others = [run["id"] for run in told]
    assert others[:2] == [first, first]
    assert len({first, *others[2:]}) == 4


def run_info(folder: Path, id: str = "x", step: int = 0) -> RunInfo:  # noqa: A002
    return RunInfo(
        output_dir=folder,
        project="p",
        id=id,
        name="n",
        settings={"seed": 1},
        step=step,
    )


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(EnvironmentFault, match=r"pip install .*\[trackio\]"):
        Trackers(("trackio",), run_info(Path()), print)


def test_settings_of_watching() -> None:
    read = train_config({"report_to": "tensorboard,wandb", "wandb_project": "x"})
    assert read.config.report.report_to == ("tensorboard", "wandb")
    assert read.config.report.project == "x"
    metric = train_config({"metric_for_best_model": "loss"}).config.report
    assert metric.metric_for_best_model == "eval_loss"
    with pytest.raises(ConfigError, match="eval_strategy=no"):
        train_config({"load_best_model_at_end": True, "eval_strategy": "no"})
    with pytest.raises(ConfigError) as caught:
        train_config(
            {"push_to_hub": True, "greater_is_better": True, "hub_token": "s3"}
        )
    assert "hub_model_id" in str(caught.value)
    assert "smaller" in str(caught.value)
    assert "s3" not in str(caught.value)
