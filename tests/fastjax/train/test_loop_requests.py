"""What a user may ask of a run: save now, stop, stop early, the best, samples."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from fastjax import files
from fastjax.errors import Interrupted, StorageError
from fastjax.train import checkpoint, control_files
from fastjax.train.faults import VARIABLE
from fastjax.train.state import TrainState


def lines(output_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(s) for s in (output_dir / name).read_text().splitlines()]


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(output_dir)]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def touching(tiny: SimpleNamespace) -> Any:
    """Makes a loader that touches files of the run as batches are made."""

    def make(files_by_step: dict[int, Path]) -> Any:
        class Touching(tiny.TinyLoader):
            def batch(self, step: int) -> dict[str, np.ndarray]:
                if step in files_by_step:
                    files_by_step[step].touch()
                return super().batch(step)

        return Touching()

    return make


def test_files_ask_to_save_and_to_stop(
    tiny: SimpleNamespace, tmp_path: Path, touching: Any
) -> None:
    asked = {3: tmp_path / control_files.SAVE, 5: tmp_path / control_files.STOP}
    options = {"save_steps": 0, "save_total_limit": 9}
    with pytest.raises(Interrupted, match="stop file: stopped after step 5") as caught:
        tiny.train(tmp_path, job={"train_loader": touching(asked)}, **options)
    assert caught.value.exit_code == 130
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000005"]
    assert not any(path.exists() for path in asked.values())
    again = tiny.train(tmp_path, **options)
    whole = tiny.train(tmp_path / "whole", **options)
    assert again.metrics["train_loss"] == whole.metrics["train_loss"]
    adapters = [f / "adapter_model.bytes" for f in (tmp_path, tmp_path / "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


BEST = {
    "eval_steps": 1,
    "learning_rate": 0.2,
    "warmup_steps": 0.0,
    "early_stopping_patience": 2,
    "load_best_model_at_end": True,
}


def test_the_best_weights_are_the_result_and_patience_ends_the_run(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, read, states = checkpoint.save, checkpoint.read_state, []

    def saving(folder: Path, state: TrainState, *args: Any, **kwargs: Any) -> Path:
        states.append(state)
        return save(folder, state, *args, **kwargs)

    def reading(*args: Any) -> TrainState:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states.pop()))
        return read(*args)

    options = BEST | {"save_steps": 3, "save_total_limit": 1, "eval_on_start": True}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saving)
        patch.setattr(checkpoint, "read_state", reading)
        result = tiny.train(tmp_path, console=console, **options)
    losses = {r["step"]: r["eval_loss"] for r in lines(tmp_path) if "eval_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert min(losses) == 0
    assert 0 < best == result.step - 2 < 6
    assert f"stopped early at step {result.step} of 8" in said(console)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["best"] == {"step": best, "eval_loss": losses[best]}
    assert run["steps_done"] == result.step
    assert run["published_step"] == best
    kept = tmp_path / f"checkpoint-{best:06d}" / "adapter_model.bytes"
    written = (tmp_path / "adapter_model.bytes").read_bytes()
    assert written == kept.read_bytes()
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(result.trainable)]
    again = tiny.train(tmp_path, console=console, **options)
    assert again.was_finished
    for actual, wanted in zip(jax.tree.leaves(again.trainable), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_the_whole_model_is_written_once_and_with_the_best_weights(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    def write_model(folder: Path, trainable: Any) -> None:
        writes.append(run_file.exists() and json.loads(run_file.read_text()))
        folder.mkdir(exist_ok=True)
        tiny.write_adapter(folder, trainable)

    def train() -> Any:
        return tiny.train(tmp_path, job=job, **options)

    run_file, writes = tmp_path / "run.json", []
    job = {"write_adapter": None, "write_model": write_model}
    options = BEST | {"full_finetuning": True}
    first = train()
    best = json.loads(run_file.read_text())["best"]["step"]
    assert 0 < best < first.step
    written = (tmp_path / "model" / "adapter_model.bytes").read_bytes()
    assert train().was_finished
    assert len(writes) == 1
    shutil.rmtree(tmp_path / "model")
    assert not train().was_finished
    assert len(writes) == 2
    assert not writes[0]["is_finished"]
    assert (tmp_path / "model" / "adapter_model.bytes").read_bytes() == written
    assert json.loads(run_file.read_text())["published_step"] == best


def test_of_a_damaged_best_checkpoint_nothing_is_taken(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "flip@save:after_rename@1")
    last = tiny.train(tmp_path, console=console, **BEST)
    assert "best weights cannot be read from checkpoint-000001" in said(console)
    assert f"the weights of step {last.step}, the last, are the result" in said(console)
    assert "SHA-256" in said(console)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["best"]["step"], run["published_step"]) == (1, last.step)
    kept = tmp_path / f"checkpoint-{last.step:06d}" / "adapter_model.bytes"
    written = (tmp_path / "adapter_model.bytes").read_bytes()
    assert written == kept.read_bytes()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.trainable))
    assert tiny.train(tmp_path, **BEST).was_finished


def test_a_finished_run_whose_best_checkpoint_is_damaged_says_what_is_where(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    last = tiny.train(tmp_path, **BEST).step
    best = json.loads((tmp_path / "run.json").read_text())["published_step"]
    assert best < last
    (tmp_path / checkpoint.name_of(best) / checkpoint.RECORD_NAME).write_text("{")
    written = (tmp_path / "adapter_model.bytes").read_bytes()
    again = tiny.train(tmp_path, console=console, **BEST)
    assert again.was_finished
    assert (tmp_path / "adapter_model.bytes").read_bytes() == written
    told = said(console)
    assert f"this run is finished: {tmp_path} holds the weights of step {best}" in told
    assert f"the model in memory has those of step {last}, the last" in told
    assert "are the result" not in told


def test_samples_are_answered_at_each_evaluation(
    tiny: SimpleNamespace, tmp_path: Path, console: Console
) -> None:
    job = {"sampler": lambda trainable: [("hi", "\x1b[31mred"), ("b", "c")]}
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 0}
    tiny.train(tmp_path, job=job, console=console, **options)
    found = lines(tmp_path, "samples.jsonl")
    assert [entry["step"] for entry in found] == [2, 2, 4, 4]
    assert found[0] == {"step": 2, "prompt": "hi", "answer": "\x1b[31mred"}
    assert "\x1b" not in said(console)
    assert "[31mred" in said(console)
    anew = {"resume_from_checkpoint": "no", "max_steps": 2}
    tiny.train(tmp_path, job=job, **options | anew)
    assert lines(tmp_path, "samples.jsonl") == found[:2]
    assert lines(tmp_path, "samples.jsonl.old") == found


def test_a_full_disk_may_cost_one_checkpoint_only(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "enospc@save:after_state@2")
    options = {"max_steps": 4, "on_save_error": "continue"}
    result = tiny.train(tmp_path, console=console, **options)
    assert result.step == 4
    assert "going on without this checkpoint" in said(console)
    assert names(tmp_path) == ["checkpoint-000004"]


def test_when_the_last_save_fails_the_adapter_goes_to_another_disk(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "eio@save:after_state@2")
    other = tmp_path / "other"
    options = {"max_steps": 2, "fallback_dir": str(other)}
    with pytest.raises(StorageError, match="Input/output error"):
        tiny.train(tmp_path / "run", console=console, **options)
    (saved,) = other.iterdir()
    monkeypatch.delenv(VARIABLE)
    tiny.train(tmp_path / "run", **options)
    kept = tmp_path / "run" / "checkpoint-000002" / "adapter_model.bytes"
    assert (saved / "adapter_model.bytes").read_bytes() == kept.read_bytes()
    assert f"was saved in {saved}" in said(console)


def test_fewer_checkpoints_are_kept_where_the_disk_is_small(
    tiny: SimpleNamespace,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 5000)
    tiny.train(tmp_path, console=console, max_steps=6, save_total_limit=3)
    assert "so many are kept, not save_total_limit=3" in said(console)
    assert len(names(tmp_path)) < 3
    monkeypatch.setattr(files, "free_bytes", lambda path: 2500)
    tiny.train(tmp_path / "one", console=console, max_steps=2)
    assert "room for one checkpoint" in said(console)
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(StorageError, match="it needs"):
        tiny.train(tmp_path / "other")
    assert names(tmp_path / "other") == []
