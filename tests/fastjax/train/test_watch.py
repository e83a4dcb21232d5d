"""Best weights, warnings, trackers and the plot: what follows the metrics of a run."""

import sys
import types
from pathlib import Path
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
    """Stands for wandb and trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []

    def init(self, **options: object) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict, step: int) -> None:
        if step == 3:
            raise OSError("no route to host")
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


class FakeMLflow(types.ModuleType):
    """Stands for mlflow; takes every call."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "MlflowException":
            raise AttributeError(name)
        return lambda *_, **__: self.calls.append(name)


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
    info = RunInfo(
        output_dir=tmp_path, project="p", name="n", settings={"seed": 1}, step=2
    )
    notes: list[str] = []
    names = ("none", "wandb", "tensorboard", "mlflow")
    trackers = Trackers(names, info, notes.append)
    for step in (2, 3, 4):
        trackers.log({"step": step, "loss": 1.5, "eval_loss": 2.0, "time": None})
    trackers.close()
    assert [call[0] for call in wandb.calls] == ["init", "log"]
    assert wandb.calls[0][1]["resume"] == "allow"
    assert wandb.calls[1][1] == {"train/loss": 1.5, "eval/loss": 2.0}
    assert board.calls[0] == ("tensorboard", 3)
    assert ("train/loss", 1.5, 4) in board.calls
    assert mlflow.calls[-1] == "end_run"
    assert mlflow.calls.count("log_metrics") == 3
    assert len(notes) == 1
    assert "wandb failed" in notes[0]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    info = RunInfo(output_dir=Path(), project="p", name="n", settings={}, step=0)
    with pytest.raises(EnvironmentFault, match=r"pip install .*\[trackio\]"):
        Trackers(("trackio",), info, print)


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
