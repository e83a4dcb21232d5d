"""A model folder of a second's training, and data for it."""

import json
import shutil
from pathlib import Path

import pytest

ROWS = [
    {"instruction": f"Name number {n}.", "input": "", "output": f"It is {n}."}
    for n in range(12)
]


@pytest.fixture(scope="session")
def small_model(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, 512 embeddings and 403 tokens, with a chat template."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(fixtures / "tiny_llama3", folder)
    shutil.copytree(fixtures / "tokenizer_v5", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short rows of instruction, input and output."""
    path = tmp_path_factory.mktemp("data") / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
