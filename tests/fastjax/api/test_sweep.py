"""Adapters that train together are those that train alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastjax import cli
from fastjax.api import grid, run_sweep, run_training, sweep
from fastjax.api.sweep_group import SweepGroup
from fastjax.api.sweep_member import SweepMember
from fastjax.api.sweep_plan import sweep_runs
from fastjax.config import TrainConfig
from fastjax.config_file import read_config_file
from fastjax.errors import ConfigError, ModelError, OutOfMemory
from fastjax.flat_config import train_config
from fastjax.train.evaluate import EvalResult

pytestmark = pytest.mark.usefixtures("compiled_once")


def settings(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    flat = {
        "model": str(model),
        "dataset_name": str(data),
        "output_dir": str(output),
        "dtype": "float32",
        "max_steps": 3,
        "max_length": 160,
        "gradient_accumulation_steps": 1,
        "remat": "none",
        "load_in_4bit": False,
        "logging_steps": 1,
        "warmup_steps": 0,
        "val_set_size": 4,
        "lora_r": 4,
        "lora_dropout": 0.1,
    }
    return train_config(flat | changes).config


def records(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_each_adapter_is_the_one_that_trains_alone(
    small_model: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = []
    train = SweepGroup.train
    monkeypatch.setattr(
        SweepGroup, "train", lambda g: (together.append(len(g._members)), train(g))
    )
    config = settings(small_model, alpaca_file, tmp_path / "sweep")
    changes = [
        {"seed": 2},
        {"learning_rate": 1e-3, "seed": 1, "lora_alpha": 32},
        {"lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]},
    ]
    result = run_sweep(config, changes)
    assert together == [2, 1]
    assert result.best.metrics["eval_loss"] == min(
        entry.metrics["eval_loss"] for entry in result.entries
    )
    assert "learning_rate" in result._repr_html_()
    for entry in result.entries:
        for name in ("adapter_config.json", "tokenizer.json", "README.md", "run.json"):
            assert (entry.folder / name).is_file()
    (folder,) = [e.folder for e in result.entries if e.changes == changes[1]]
    read = read_config_file(folder / "config.yaml").config
    alone = tmp_path / "alone"
    run_training(dataclasses.replace(read, output_dir=str(alone)))
    for actual, expected in zip(records(folder), records(alone), strict=True):
        assert actual["step"] == expected["step"]
        for key in {"loss", "grad_norm", "learning_rate", "eval_loss"} & set(expected):
            assert actual[key] == pytest.approx(expected[key], rel=1e-4)
    weights = load_file(folder / "adapter_model.safetensors")
    others = load_file(alone / "adapter_model.safetensors")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value, others[name], atol=1e-5)


def test_what_is_finished_is_not_trained_again(
    small_model: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        *("--model", str(small_model), "--dataset_name", str(alpaca_file)),
        *("--output_dir", str(tmp_path), "--max_steps", "3", "--max_length", "160"),
        *("--no-load_in_4bit", "--dtype", "float32", "--lora_r", "2"),
        *("--gradient_accumulation_steps", "1", "--warmup_steps", "0"),
    ]
    start = SweepMember.start

    def evaluated_at_once(member: SweepMember) -> None:
        start(member)
        member.evaluated(0, EvalResult(loss=0.1, num_tokens=9, runtime_seconds=1.0))

    monkeypatch.setattr(SweepMember, "start", evaluated_at_once)
    assert cli.run("sweep", [*words, "--vary", "learning_rate=1e30,1e-3"]) == 0
    shown = capsys.readouterr()
    assert "learning_rate-1e30: diverged at step 3" in shown.err
    assert str(tmp_path / "learning_rate-1e30") in shown.out  # However narrow.
    assert (tmp_path / "learning_rate-1e-3" / "adapter_model.safetensors").is_file()
    told = json.loads((tmp_path / "sweep.json").read_text())
    best, diverged = told["adapters"]
    assert best["changes"] == {"learning_rate": "1e-3"}
    assert best["metrics"]["eval_loss"] == 0.1
    assert not (tmp_path / "learning_rate-1e30" / "adapter_model.safetensors").exists()
    losses = ("train_loss", "eval_loss", "eval_perplexity")
    assert [diverged["metrics"][name] for name in losses] == [None] * 3
    monkeypatch.setattr("fastjax.api.sweep.load_model", None)
    assert cli.run("sweep", [*words, "--vary=learning_rate=1e-3,1e30"]) == 0
    other = [*words, "--seed", "7", "--vary", "learning_rate=1e-3"]
    assert cli.run("sweep", other) == 2
    assert "other settings" in capsys.readouterr().err


def test_what_a_sweep_cannot_do_is_told_together(tmp_path: Path) -> None:
    config = train_config(
        {
            "remat": "auto",
            "optim": "adamw_8bit",
            "push_to_hub": True,
            "hub_model_id": "a",
        }
    ).config
    changes = [{"max_length": 3}, {"lora_r": 0}, {"seed": 1}, {"seed": 1}]
    with pytest.raises(ConfigError) as caught:
        run_sweep(config, changes)
    said = str(caught.value)
    for part in ("remat", "adamw_8bit", "uploads", "max_length", "lora_r=0", "twice"):
        assert part in said
    with pytest.raises(ConfigError, match="needs changes"):
        run_sweep(TrainConfig(), [])


@pytest.mark.parametrize("words", [[], ["--vary"], ["--vary", "lora_r"]])
def test_the_command_wants_values(words: list[str]) -> None:
    assert cli.run("sweep", words) == 2


def test_a_grid_has_every_combination() -> None:
    assert grid({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_long_names_that_are_cut_stay_apart(tmp_path: Path) -> None:
    changes = [{"lora_target_modules": ["q_proj"] * 20 + [last]} for last in "ab"]
    names = [run.name for run in sweep_runs(TrainConfig(), changes, tmp_path)]
    assert [len(name) for name in names] == [120, 120]
    assert names[0] != names[1]


def test_each_shape_must_fit_before_any_is_loaded(
    small_model: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(config: TrainConfig) -> None:
        raise ModelError("weights are read")

    monkeypatch.setattr(sweep, "_base_model", load)
    config = settings(small_model, alpaca_file, tmp_path, memory_gib=0.05)
    with pytest.raises(OutOfMemory):
        run_sweep(config, [{"lora_r": 2}, {"lora_r": 8192}])
    lora = dataclasses.replace(config.lora, lora_r=8192)  # Which no adapter has.
    with pytest.raises(ModelError, match="weights are read"):
        run_sweep(dataclasses.replace(config, lora=lora), [{"lora_r": 2}])
