"""Where a run begins: its first state, or the one of a checkpoint of this very run."""

import contextlib
from typing import Any

import jax
from jaxtyping import PyTree

from fastjax import files
from fastjax.train import checkpoint, record, resume
from fastjax.train.job import Job
from fastjax.train.optimizer import make_optimizer
from fastjax.train.state import TrainState, abstract_state, init_state, is_alive

_LOST = (
    "the weights in memory were lost in the failure: load the model again before you "
    "use it; the newest checkpoint is {}"
)


def find(job: Job, note: resume.Note) -> resume.Found | None:
    """Returns the checkpoint to go on from, None to start at step 0.

    Raises:
      ConfigError: It belongs to a run with other settings.
      ModelError: No checkpoint of the run can be read.
      StorageError: The folder cannot be read.
    """
    with files.storage_errors("look for checkpoints", job.output_dir):
        files.remove_leftovers(job.output_dir)
        mode = job.config.resume_from_checkpoint
        found = resume.find(job.output_dir, mode, note)
    if found is not None:
        resume.require_same_run(found, job.config, identity(job), note, remat=job.remat)
        checkpoint.require_fitting(found.folder, shapes(job), found.record)
        note(f"continuing from {found.folder}")
    return found


def identity(job: Job) -> dict[str, Any]:
    """Returns what a resumed run must share with this one."""
    data = job.train_loader.fingerprint
    return record.identity(job.config, job.total_steps, data=data, base=job.base)


def run_id(job: Job, found: resume.Found | None) -> str | None:
    """Returns the id in the trackers of the run that goes on, None for a new run.

    One that takes a checkpoint of another folder is a new run.
    """
    if found is None or found.folder.resolve().parent != job.output_dir.resolve():
        return None
    return found.record.get("run_id")


def shapes(job: Job) -> TrainState:
    """Returns what a checkpoint must hold: shapes, dtypes, and places on the host."""
    optimizer = make_optimizer(job.config.optimizer, job.total_steps)
    return abstract_state(job.trainable, optimizer, job.config.dtype)


def start_state(job: Job, found: resume.Found | None, note: resume.Note) -> TrainState:
    """Returns the state to go on from; weights of a checkpoint replace the job's."""
    if found is None:
        return _first_state(job, job.trainable)
    like = shapes(job)
    # Else full fine-tuning would hold its weights twice.
    jax.tree.map(lambda leaf: leaf.delete(), job.trainable)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(note, _LOST.format(found.folder))
        state = checkpoint.read_state(found.folder, like, found.record)
        on_failure.pop_all()
    return state


def hand_back(job: Job, trainable: PyTree, newest: str, note: resume.Note) -> None:
    """Gives the weights to the caller, unless a failing step has consumed them."""
    if job.on_exit is None:
        return
    if is_alive(trainable):
        job.on_exit(trainable)
    else:
        note(_LOST.format(newest))


def _first_state(job: Job, trainable: PyTree) -> TrainState:
    """Returns the state at step 0."""
    optimizer = make_optimizer(job.config.optimizer, job.total_steps)
    return init_state(trainable, optimizer, job.config.dtype)
