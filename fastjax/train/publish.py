"""Puts a run's result and description at the top of its output folder."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from fastjax import files
from fastjax.errors import ModelError
from fastjax.train.batches import DeviceBatch
from fastjax.train.checkpoint import WriteWeights
from fastjax.train.job import Job
from fastjax.train.metrics import finite
from fastjax.train.state import is_alive

RUN_FILE = "run.json"
MODEL_FOLDER = "model"
BAD_BATCH = "nan_batch.jsonl"


def publish_adapter(
    output_dir: Path, trainable: PyTree, write_adapter: WriteWeights
) -> None:
    """Writes the adapter into the output folder; each file appears whole.

    Raises:
      StorageError: It cannot be written; files of before are intact.
    """
    with files.added_files(output_dir) as aside:
        write_adapter(aside, trainable)


def rescue_adapter(
    job: Job, trainable: PyTree, step: int, *, note: Callable[[str], None]
) -> None:
    """Writes the newest adapter to another disk when the run's own one fails."""
    if job.write_adapter is None or not step or not is_alive(trainable):
        return
    place = job.config.report.fallback_dir or tempfile.gettempdir()
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        name = f"{job.output_dir.name}-step-{step}-"
        folder = Path(tempfile.mkdtemp(prefix=name, dir=place))
        job.write_adapter(folder, trainable)
    except OSError as error:
        note(f"the adapter of step {step} could not be saved in {place}: {error}")
        return
    note(f"the adapter of step {step} was saved in {folder}")


def write_bad_batch(
    output_dir: Path, step: int, batch: DeviceBatch, metrics: Mapping[str, float]
) -> None:
    """Writes the rows of a step that was not finite, for a look at them."""
    arrays = {name: np.asarray(array) for name, array in batch.arrays.items()}
    ids, targets = (arrays[name] for name in ("input_ids", "targets"))
    lines = []
    for place in np.ndindex(ids.shape[:2]):
        is_token = arrays["segment_ids"][place] > 0
        row = {
            "step": step,
            "micro_batch": place[0],
            "row": place[1],
            "trained_tokens": int((targets[place] >= 0).sum()),
            "input_ids": ids[place][is_token].tolist(),
            **finite(metrics),
        }
        lines.append(json.dumps(row) + "\n")
    with files.storage_errors(f"write {BAD_BATCH}", output_dir):
        files.write_atomic(output_dir / BAD_BATCH, "".join(lines))


def write_run_file(output_dir: Path, description: Mapping[str, Any]) -> None:
    """Writes `run.json`: settings, versions, choices, and whether the run is over."""
    with files.storage_errors(f"write {RUN_FILE}", output_dir):
        files.write_atomic(output_dir / RUN_FILE, files.dump_json(description))


def is_published(output_dir: Path) -> bool:
    """Whether `run.json` says that the result stands beside it."""
    return _description(output_dir).get("is_finished") is True


def published_step(job: Job) -> int | None:
    """Returns the step of the weights that are the result; None while there is none."""
    if job.write_model is not None and not (job.output_dir / MODEL_FOLDER).exists():
        return None
    return _description(job.output_dir).get("published_step")


def _description(output_dir: Path) -> dict[str, Any]:
    try:
        return files.read_json(output_dir / RUN_FILE)
    except ModelError:
        return {}
