"""A model folder of a second's training, and data for it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs, so that equal runs compile once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled_once(compiled_programs: Path) -> Iterator[None]:
    """Keeps what a test compiles for the tests that compile the same."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(compiled_programs), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session", autouse=True)
def log_of_transformers() -> None:
    """Opens it: it keeps the stream of its first use, which must outlast a test."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.get_logger()
