"""The loop: what it writes, how it goes on, and when it refuses."""

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fastjax.config import LoRAConfig
from fastjax.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    Interrupted,
    OutOfMemory,
    StorageError,
    TrainingDiverged,
)
from fastjax.train import checkpoint
from fastjax.train.batches import DeviceBatch
from fastjax.train.compiled import CompiledSteps, out_of_memory
from fastjax.train.faults import VARIABLE, InjectedFault
from fastjax.train.lock import output_lock
from fastjax.train.metrics import CLOCK_FIELDS
from fastjax.train.reporter import Reporter
from fastjax.train.state import TrainState


def records(output_dir: Path) -> list[dict[str, Any]]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS}
        for line in lines
    ]


def adapter(output_dir: Path) -> bytes:
    return (output_dir / "adapter_model.bytes").read_bytes()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=60)


def said(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="session")
def whole(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.train(folder)
    return folder


def test_a_run_writes_metrics_checkpoints_and_adapter(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    left: list[Any] = []
    result = tiny.train(tmp_path, console=console, job={"on_exit": left.append})
    assert result.step == 8
    assert [entry["step"] for entry in records(tmp_path)] == [3, 4, 6, 8, 8]
    assert result.metrics["train_loss"] > 0
    assert "train_loss" in result._repr_html_()
    assert result.metrics["eval_loss"] == records(tmp_path)[-1]["eval_loss"]
    assert (
        result.metrics["num_trained_tokens"]
        == records(tmp_path)[3]["num_trained_tokens"]
    )
    assert result.memory.alias_bytes > 0
    assert len(result.step_seconds) == 8
    assert left[0] is result.trainable
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.bytes",
        "checkpoint-000006",
        "checkpoint-000008",
        "loss.svg",
        "metrics.jsonl",
        "run.json",
    }
    run_file = json.loads((tmp_path / "run.json").read_text())
    assert run_file["is_finished"]
    assert run_file["settings"]["learning_rate"] == 1e-2
    assert "compiling the step" in said(console)
    assert "step 8/8  epoch 2.00  loss" in said(console)


def test_files_follow_the_umask(whole: Path) -> None:
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "metrics.jsonl":
            assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_finished_run_says_so_and_trains_nothing(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    first = tiny.train(tmp_path)
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(first.trainable)]
    second = tiny.train(tmp_path, console=console)
    assert second.was_finished
    assert second.step_seconds == ()
    assert "this run is finished" in said(console)
    assert second.metrics["train_loss"] == first.metrics["train_loss"]
    for actual, wanted in zip(jax.tree.leaves(second.trainable), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("step", [3, 5])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_was(
    tiny: SimpleNamespace,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    monkeypatch.setenv(VARIABLE, f"{'int' if step == 3 else 'term'}@step@{step}")
    with pytest.raises(Interrupted) as caught:
        tiny.train(tmp_path, job={"resume_command": "python scripts/train.py"})
    assert caught.value.exit_code == 130
    assert "to continue, run python scripts/train.py" in str(caught.value)
    assert f"after step {step} of 8" in str(caught.value)
    assert (tmp_path / f"checkpoint-{step:06d}").is_dir()
    monkeypatch.delenv(VARIABLE)
    tiny.train(tmp_path)
    assert adapter(tmp_path) == adapter(whole)
    assert records(tmp_path) == records(whole)


def test_other_settings_are_refused_with_a_table(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "raise@step@5")
    with pytest.raises(InjectedFault):
        tiny.train(tmp_path)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError) as caught:
        tiny.train(
            tmp_path, learning_rate=5e-3, job={"train_loader": tiny.TinyLoader(seed=1)}
        )
    lines = str(caught.value).splitlines()
    assert any(line.split() == ["learning_rate", "0.01", "0.005"] for line in lines)
    assert any(line.split() == ["data", "tiny-0", "tiny-1"] for line in lines)
    assert "allow_config_change" in lines[-1]
    changed = tiny.train(tmp_path, learning_rate=5e-3, allow_config_change=True)
    assert changed.step == 8


def test_a_harmless_change_is_noted(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    tiny.train(tmp_path)
    tiny.train(tmp_path, remat="layer", logging_steps=1, console=console)
    assert "not bit exact because remat was none, is layer" in said(console)


def test_another_base_model_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.train(tmp_path, job={"base": "a1"})
    with pytest.raises(ConfigError) as caught:
        tiny.train(tmp_path, job={"base": "b2"})
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["base", "a1", "b2"] in rows
    assert tiny.train(tmp_path, job={"base": "a1"}).was_finished


def test_weights_of_another_shape_are_refused(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    tiny.train(tmp_path)
    _, trainable, _ = tiny.split()
    fewer = jax.tree.map(lambda leaf: leaf[:2], trainable)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointMismatch, match=r"saved float32\[16, 4\]"):
        tiny.train(tmp_path, job={"trainable": fewer})
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fewer))
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_weights_make_room_before_those_of_the_checkpoint_are_read(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny.train(tmp_path)
    _, trainable, _ = tiny.split()
    deleted: list[bool] = []
    closed: list[Reporter] = []
    monkeypatch.setattr(Reporter, "close", lambda self: closed.append(self))

    def unreadable(*args: object, **kwargs: object) -> None:
        deleted.extend(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
        raise OSError("Input/output error")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", unreadable)
    with pytest.raises(OSError, match="Input/output"):
        tiny.train(tmp_path, job={"trainable": trainable}, console=console)
    assert deleted == [True, True]
    assert len(closed) == 1
    assert "the weights in memory were lost" in said(console)


def test_weights_that_a_failing_step_consumed_are_not_handed_back(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole_step, left = CompiledSteps.__call__, []

    def failing(self: CompiledSteps, state: TrainState, batch: DeviceBatch) -> Any:
        result = whole_step(self, state, batch)
        if int(result[0].step) == 4:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
        return result

    monkeypatch.setattr(CompiledSteps, "__call__", failing)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        tiny.train(tmp_path, job={"on_exit": left.append}, console=console)
    assert left == []
    assert "the weights in memory were lost" in said(console)
    assert "newest checkpoint is" in said(console)


def test_starting_anew_keeps_the_old_run(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.train(tmp_path)
    tiny.train(tmp_path, resume_from_checkpoint="no", seed=1)
    assert (tmp_path / "checkpoint-000008.old" / "manifest.json").exists()
    assert (tmp_path / "metrics.jsonl.old").exists()
    assert len(records(tmp_path)) == 5


def poisoned(tiny: SimpleNamespace, steps: tuple[int, ...]) -> Any:
    """Returns a loader whose tokens lead to NaN at these steps."""

    @dataclasses.dataclass
    class Poisoned(tiny.TinyLoader):
        def batch(self, step: int) -> dict[str, np.ndarray]:
            batch = super().batch(step)
            if step + 1 in steps:
                batch["positions"] = np.full_like(batch["positions"], -1)
            return batch

    return Poisoned()


def fragile(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy that is NaN where a position is negative."""
    from fastjax.losses import cross_entropy

    loss, tokens = cross_entropy(*args, **kwargs)
    is_bad = jnp.any(args[3]["positions"] < 0)
    return jnp.where(is_bad, jnp.nan, loss), tokens


def test_one_bad_step_is_left_out_and_never_logged_as_zero(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    job = {"train_loader": poisoned(tiny, (3, 5)), "loss": fragile}
    result = tiny.train(tmp_path, logging_steps=1, job=job, console=console)
    assert result.step == 8
    by_step = {e["step"]: e for e in records(tmp_path) if "loss" in e}
    assert by_step[3]["loss"] is None
    assert by_step[3]["skipped_steps"] == 1
    assert by_step[4]["loss"] > 0
    assert "step 3: loss nan" in said(console)


def test_two_bad_steps_in_a_row_stop_the_run(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    job = {"train_loader": poisoned(tiny, (5, 6)), "loss": fragile}
    with pytest.raises(TrainingDiverged) as caught:
        tiny.train(tmp_path, job=job)
    assert caught.value.exit_code == 7
    assert "checkpoint-000004" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-000002", "checkpoint-000004"]
    assert not (tmp_path / "adapter_model.bytes").exists()
    rows = (tmp_path / "nan_batch.jsonl").read_text().splitlines()
    assert len(rows) == 4
    assert json.loads(rows[0])["step"] == 6
    assert json.loads(rows[0])["loss"] is None
    assert json.loads(rows[0])["input_ids"]


def test_bad_steps_in_a_row_are_counted_across_a_resume(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"train_loader": poisoned(tiny, (4, 5)), "loss": fragile}
    monkeypatch.setenv(VARIABLE, "int@step@4")
    with pytest.raises(Interrupted):
        tiny.train(tmp_path, job=job)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(TrainingDiverged, match="step 5"):
        tiny.train(tmp_path, job=job)


def test_float16_overflow_is_no_divergence(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    job = {"train_loader": poisoned(tiny, (2, 3, 4)), "loss": fragile}
    result = tiny.train(tmp_path, dtype="float16", logging_steps=1, job=job)
    skipped = sum(entry.get("skipped_steps", 0) for entry in records(tmp_path))
    assert result.step == 8
    assert skipped == 3


def test_nothing_to_learn_is_an_error_at_the_first_step(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no token of the first batch"):
        tiny.train(tmp_path / "a", job={"train_loader": tiny.TinyLoader(masked=True)})

    def detached(graphdef: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
        from fastjax.losses import cross_entropy

        stopped = jax.lax.stop_gradient(trainable)
        return cross_entropy(graphdef, stopped, *args, **kwargs)

    with pytest.raises(ConfigError, match="exactly 0"):
        tiny.train(tmp_path / "b", job={"loss": detached})


def test_a_folder_in_use_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with (
        output_lock(tmp_path, lambda text: None),
        pytest.raises(ConfigError, match="in use by another run: process"),
    ):
        tiny.train(tmp_path)
    tiny.train(tmp_path, max_steps=2)


def test_an_output_folder_that_is_a_file(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError) as caught:
        tiny.train(tmp_path / "out")
    assert caught.value.exit_code == 8


def test_a_full_disk_leaves_the_old_checkpoint(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "enospc@save:after_state@4")
    with pytest.raises(StorageError, match="No space left on device") as caught:
        tiny.train(tmp_path)
    assert "MiB free" in str(caught.value)
    assert [path.name for path in tmp_path.glob("*-0*")] == ["checkpoint-000002"]
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.delenv(VARIABLE)
    tiny.train(tmp_path)
    assert adapter(tmp_path) == adapter(whole)


def test_epochs_decide_the_length(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = tiny.train(tmp_path, max_steps=-1, num_train_epochs=0.75)
    assert result.step == 3


def test_full_fine_tuning_writes_no_adapter(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    result = tiny.train(
        tmp_path, full_finetuning=True, job={"write_adapter": None}, max_steps=2
    )
    assert not (tmp_path / "adapter_model.bytes").exists()
    assert tiny.train(
        tmp_path, full_finetuning=True, job={"write_adapter": None}, max_steps=2
    ).was_finished
    assert math.isfinite(result.metrics["train_loss"])


def test_dropout_off_needs_no_key(tiny: SimpleNamespace, tmp_path: Path) -> None:
    result = tiny.train(tmp_path, lora=LoRAConfig(), max_steps=2)
    assert result.step == 2


def test_lack_of_memory_says_what_to_change() -> None:
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"
    with (
        pytest.raises(OutOfMemory, match="gradient_accumulation_steps"),
        out_of_memory(None),
    ):
        raise jax.errors.JaxRuntimeError(text)


def test_a_terminal_gets_a_bar(tiny: SimpleNamespace, tmp_path: Path) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    tiny.train(tmp_path, console=terminal)
    assert "8/8" in screen.getvalue()
