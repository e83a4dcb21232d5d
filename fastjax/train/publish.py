"""Puts a run's result and description at the top of its output folder."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from fastjax.errors import ModelError
from fastjax.train import files
from fastjax.train.checkpoint import WriteAdapter

RUN_FILE = "run.json"


def publish_adapter(
    output_dir: Path, trainable: PyTree, write_adapter: WriteAdapter
) -> None:
    """Writes the adapter into the output folder; each file appears whole.

    Raises:
      StorageError: It cannot be written; files of before are intact.
    """
    aside = output_dir / f".tmp-adapter-{os.getpid()}"
    with files.storage_errors("write the adapter", output_dir):
        try:
            aside.mkdir()
            write_adapter(aside, trainable)
            files.settle(aside)
            for path in files.files_below(aside):
                target = output_dir / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            files.fsync(output_dir)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_run_file(output_dir: Path, description: Mapping[str, Any]) -> None:
    """Writes `run.json`: settings, versions, choices, and whether the run is over."""
    with files.storage_errors(f"write {RUN_FILE}", output_dir):
        files.write_atomic(output_dir / RUN_FILE, files.dump_json(description))


def is_published(output_dir: Path) -> bool:
    """Whether `run.json` says that the result stands beside it."""
    try:
        return files.read_json(output_dir / RUN_FILE).get("is_finished") is True
    except ModelError:
        return False
