"""The shipped tutorial script runs as it is, in a process of its own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastjax.api import load_model, make_random_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the script ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    make_random_checkpoint("tiny", folder / "tiny")
    return folder, run_in(folder)


def run_in(folder: Path) -> str:
    """Runs the script for a few steps and returns what it printed."""
    data = EXAMPLES / "data" / "alpaca_small.jsonl"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "alpaca_qlora.py", "tiny", data, "5"],
        cwd=folder,
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_tutorials_say(finished: tuple[Path, str]) -> None:
    _, shown = finished
    assert "trainable params: 311,296 || all params: " in shown
    assert "seconds used for training" in shown
    assert shown.count("### Instruction:\nContinue the sequence.") == 2


def test_it_leaves_a_run_an_adapter_and_a_model(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    run = json.loads((folder / "outputs" / "run.json").read_text())
    assert run["is_finished"]
    assert run["settings"]["lr_scheduler_type"] == "cosine"
    assert run["settings"]["remat"] == "layer"
    adapter = load_model(str(folder / "lora_model"))
    assert adapter.lora is not None
    assert adapter.tokenizer is not None
    merged = load_model(str(folder / "model"))
    assert merged.lora is None
    assert merged.tokenizer is not None


def test_it_runs_again_in_the_same_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert "seconds used for training" in run_in(folder)
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns > before


def test_it_imports_the_names_of_the_tutorials() -> None:
    tree = ast.parse((EXAMPLES / "alpaca_qlora.py").read_text())
    (ours,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "fastjax"
    )
    assert {alias.name for alias in ours.names} == {
        "FastLanguageModel",
        "SFTTrainer",
        "TrainingArguments",
        "is_bfloat16_supported",
    }


def test_its_data_has_the_three_columns() -> None:
    lines = (EXAMPLES / "data" / "alpaca_small.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 40
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)
