"""The training loop: steps in order, metrics, evaluation, checkpoints, resume.

The host stays one step ahead of the device: while a step runs, the next batch is made
and sent, then the metrics of the step before are read. Nothing else waits.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections import deque
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console

from fastjax import runtime
from fastjax.errors import Interrupted
from fastjax.train import checkpoint, faults, files, health, publish, record, resume
from fastjax.train.batches import DeviceBatch, Loader, put_batch
from fastjax.train.compiled import CompiledSteps, device_peak_bytes
from fastjax.train.evaluate import evaluate, make_eval_step
from fastjax.train.job import Job
from fastjax.train.lock import output_lock
from fastjax.train.metrics import MetricsLog, finite, stamped
from fastjax.train.optimizer import make_optimizer
from fastjax.train.progress import COMPILING, Progress
from fastjax.train.result import TrainResult
from fastjax.train.signals import StopRequest
from fastjax.train.state import TrainState, init_state, is_alive
from fastjax.train.step import Metrics, make_train_step

_LOST = (
    "the weights in memory were lost in the failure: load the model again before you "
    "use it; the newest checkpoint is {}"
)


def run(job: Job, console: Console | None = None) -> TrainResult:
    """Returns the outcome of a run, which starts, goes on, or is found finished.

    Args:
      job: What to train, on what, and where to.
      console: Takes notes and progress; None writes to the standard error.

    Raises:
      ConfigError: The folder is in use, or holds a run with other settings.
      ModelError: No checkpoint of the run can be read.
      TrainingDiverged: Two steps in a row were not finite.
      Interrupted: A signal came; after the first one the state is saved.
      StorageError: Something cannot be written.
    """
    with files.storage_errors("use the output folder", job.output_dir):
        job.output_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(console or Console(stderr=True), job.total_steps)
    with (
        output_lock(job.output_dir, progress.note),
        StopRequest() as stop,
        progress,
    ):
        loop = _Loop(job, _find(job, progress), progress, stop)
        try:
            loop.train()
            return loop.finish()
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; the steps since the newest checkpoint are lost",
                where=loop.newest_checkpoint,
                fix=f"to continue, run {job.resume_command}",
            ) from None
        finally:
            newest = loop.newest_checkpoint
            _hand_back(job, loop.state.trainable, newest, progress.note)


def _find(job: Job, progress: Progress) -> resume.Found | None:
    with files.storage_errors("look for checkpoints", job.output_dir):
        files.remove_leftovers(job.output_dir)
        mode = job.config.resume_from_checkpoint
        found = resume.find(job.output_dir, mode, progress.note)
    if found is not None:
        resume.require_same_run(found, job.config, _identity(job), progress.note)
        checkpoint.require_fitting(found.folder, _shapes(job), found.record)
        progress.note(f"continuing from {found.folder}")
    return found


def _identity(job: Job) -> dict[str, Any]:
    data = job.train_loader.fingerprint
    return record.identity(job.config, job.total_steps, data=data, base=job.base)


def _first_state(job: Job, trainable: PyTree) -> TrainState:
    optimizer = make_optimizer(job.config.optimizer, job.total_steps)
    return init_state(trainable, optimizer, job.config.dtype)


def _shapes(job: Job) -> TrainState:
    """Returns what a checkpoint must hold: shapes, dtypes and places."""
    shapes = jax.eval_shape(functools.partial(_first_state, job), job.trainable)
    places = jax.tree.map(checkpoint.described, job.trainable)
    return dataclasses.replace(shapes, trainable=places)


def _start_state(job: Job, found: resume.Found | None, note: resume.Note) -> TrainState:
    """Returns the state to go on from; weights of a checkpoint replace the job's."""
    if found is None:
        return _first_state(job, job.trainable)
    like = _shapes(job)
    # Else full fine-tuning would hold its weights twice.
    jax.tree.map(lambda leaf: leaf.delete(), job.trainable)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(note, _LOST.format(found.folder))
        state = checkpoint.read_state(found.folder, like, found.record)
        on_failure.pop_all()
    return state


def _hand_back(job: Job, trainable: PyTree, newest: str, note: resume.Note) -> None:
    """Gives the weights to the caller, unless a failing step has consumed them."""
    if job.on_exit is None:
        return
    if is_alive(trainable):
        job.on_exit(trainable)
    else:
        note(_LOST.format(newest))


class _Loop:
    """One run in progress."""

    def __init__(
        self,
        job: Job,
        found: resume.Found | None,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        config, total = job.config, job.total_steps
        self.job, self.config, self.total = job, config, total
        self.progress, self.stop = progress, stop
        optimizer = make_optimizer(config.optimizer, total)
        self.steps = CompiledSteps(
            make_train_step(
                job.loss_function(job.train_loader, config.remat),
                optimizer,
                seed=config.seed,
                has_dropout=job.has_dropout,
                dtype=config.dtype,
            ),
            job.frozen,
            before_compile=lambda: progress.note(COMPILING),
            compiler_options=runtime.step_compiler_options((config.remat,)),
        )
        if job.eval_loader is not None:
            self.eval_step = make_eval_step(job.loss_function(job.eval_loader, None))
        self.log = MetricsLog(
            job.output_dir,
            logging_steps=config.logging_steps,
            total_steps=total,
            logging_first_step=config.logging_first_step,
        )
        self.step_seconds: list[float] = []
        self._in_flight: deque[tuple[int, Metrics, DeviceBatch]] = deque()
        self._mark = self._started = time.perf_counter()
        self._restore({} if found is None else found.record)
        # Last, since it frees the caller's weights.
        self.state = _start_state(job, found, progress.note)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step = self.saved_step = saved.get("step", 0)
        self.bad_steps: int = saved.get("bad_steps", 0)
        self.best: dict[str, float | int] | None = saved.get("best_metric")
        self.last_eval: dict[str, float | None] = saved.get("last_eval", {})
        self._seconds_before: float = saved.get("seconds", 0.0)
        if saved:
            self.log.restore(saved["log"])
        self.log.truncate(self.step)

    @property
    def newest_checkpoint(self) -> str:
        """Where the run would go on from."""
        folders = checkpoint.checkpoints(self.job.output_dir)
        return str(folders[-1]) if folders else "none yet"

    @property
    def seconds(self) -> float:
        """Wall time of all parts of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    def train(self) -> None:
        """Runs the steps that are left."""
        self.progress.start(self.step)
        self._mark = time.perf_counter()
        batch = self._batch_of(self.step)
        while batch is not None:
            if self.stop.is_requested:
                self._save_and_stop()
            batch = self._launch(batch)
            evaluates = self._is_due(self.config.eval_steps)
            saves = self._is_due(self.config.save_steps)
            self._read_metrics(ahead=0 if evaluates or saves else 1)
            if evaluates and self.job.eval_loader is not None:
                self._evaluate(self.job.eval_loader)
            if saves:
                self._save()
            if evaluates or saves:
                self._mark = time.perf_counter()
            self.progress.step(self.step)

    def finish(self) -> TrainResult:
        """Publishes the adapter, unless an earlier run did, and returns the outcome."""
        job = self.job
        was_finished = not self.step_seconds and publish.is_published(job.output_dir)
        if was_finished:
            self.progress.note(f"this run is finished: {job.output_dir}")
        elif job.write_adapter is not None:
            faults.hit("finish:before_adapter", self.step)
            publish.publish_adapter(
                job.output_dir, self.state.trainable, job.write_adapter
            )
            faults.hit("finish:after_adapter", self.step)
        if not was_finished:
            self._write_run_file(is_finished=True)
        return TrainResult(
            trainable=self.state.trainable,
            step=self.step,
            metrics=self._summary(),
            implementations=self.steps.implementations,
            memory=self.steps.memory,
            compile_seconds=self.steps.compile_seconds,
            step_seconds=tuple(self.step_seconds),
            was_finished=was_finished,
        )

    def _launch(self, batch: DeviceBatch) -> DeviceBatch | None:
        """Starts a step and returns the batch of the next one, on its way."""
        compiled_before = self.steps.compile_seconds
        self.state, metrics = self.steps(self.state, batch)
        self.step += 1
        self._in_flight.append((self.step, metrics, batch))
        if not compiled_before:
            self._report_compilation()
        self._mark += self.steps.compile_seconds - compiled_before
        faults.hit("step", self.step)
        return self._batch_of(self.step)

    def _report_compilation(self) -> None:
        self._write_run_file(is_finished=False)
        for line in self.steps.report():
            self.progress.note(line)
        self.progress.start(self.step - 1)

    def _batch_of(self, step: int) -> DeviceBatch | None:
        return put_batch(self.job.train_loader, step) if step < self.total else None

    def _is_due(self, every: int) -> bool:
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def _read_metrics(self, *, ahead: int) -> None:
        """Waits for the steps in flight, but for the newest `ahead` ones."""
        while len(self._in_flight) > ahead:
            step, launched, batch = self._in_flight.popleft()
            metrics = {k: float(v) for k, v in jax.device_get(launched).items()}
            now = time.perf_counter()
            seconds, self._mark = now - self._mark, now
            self.step_seconds.append(seconds)
            self._check(step, metrics)
            entry = self.log.add(
                step, metrics, batch, epoch=self._epoch(step), seconds=seconds
            )
            if entry is not None:
                entry = stamped(entry, device_peak_bytes())
                self.log.write(entry)
                self.progress.record(entry)

    def _epoch(self, step: int) -> float:
        return step / max(1, self.job.train_loader.steps_per_epoch)

    def _check(self, step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            health.require_gradient(metrics)
        self.bad_steps = health.bad_steps_in_row(metrics, self.bad_steps)
        if self.bad_steps >= health.BAD_STEPS_TO_STOP:
            raise health.diverged(step, metrics, self.newest_checkpoint)
        if metrics["skipped"]:
            self.progress.note(
                f"step {step}: loss {metrics['loss']}, grad_norm "
                f"{metrics['grad_norm']}: the update was left out"
            )

    def _evaluate(self, loader: Loader) -> None:
        result = evaluate(
            self.eval_step, self.state.trainable, self.job.frozen, loader
        ).metrics()
        self.log.write(
            {"step": self.step, "epoch": round(self._epoch(self.step), 6), **result}
        )
        self.progress.evaluation(self.step, result)
        self.last_eval = finite(result)
        loss = result["eval_loss"]
        before = math.inf if self.best is None else self.best["eval_loss"]
        if loss < before:
            self.best = {"step": self.step, "eval_loss": loss}

    def _save(self) -> None:
        self.log.flush_to_disk()
        content = {
            "identity": _identity(self.job),
            "environment": record.environment(self.config),
            "seed": self.config.seed,
            "log": self.log.state(),
            "bad_steps": self.bad_steps,
            "best_metric": self.best,
            "last_eval": self.last_eval,
            "seconds": self.seconds,
        }
        folder = checkpoint.save(
            self.job.output_dir,
            self.state,
            content,
            step=self.step,
            write_adapter=self.job.write_adapter,
            keep=self.config.save_total_limit,
        )
        self.saved_step = self.step
        self.progress.note(f"saved {folder}")

    def _save_and_stop(self) -> None:
        self._read_metrics(ahead=0)
        if self.step > self.saved_step:
            self._save()
        raise Interrupted(
            f"{self.stop.signal_name}: stopped after step {self.step} of {self.total}",
            where=self.newest_checkpoint,
            fix=f"to continue, run {self.job.resume_command}",
        )

    def _write_run_file(self, *, is_finished: bool) -> None:
        memory = self.steps.memory
        content = {
            "is_finished": is_finished,
            "total_steps": self.total,
            "data": self.job.train_loader.fingerprint,
            "settings": record.settings(self.config),
            "environment": record.environment(self.config),
            "implementations": self.steps.implementations,
            "memory": None if memory is None else dataclasses.asdict(memory),
            "compile_seconds": self.steps.compile_seconds,
        }
        publish.write_run_file(self.job.output_dir, content)

    def _summary(self) -> dict[str, float | int | None]:
        totals, seconds = self.log.totals, max(self.seconds, 1e-9)
        summary = {
            "train_runtime": self.seconds,
            "train_samples_per_second": totals.rows / seconds,
            "train_steps_per_second": totals.steps / seconds,
            "train_loss": totals.loss,
            "epoch": self._epoch(self.step),
            "num_tokens": totals.tokens,
            "num_trained_tokens": totals.trained_tokens,
        }
        return {**finite(summary), **self.last_eval}
