"""The training loop: steps in order, metrics, evaluation, checkpoints, resume.

The host stays one step ahead of the device: while a step runs, the next batch is made
and sent, then the metrics of the step before are read. Nothing else waits.
"""

import contextlib
import dataclasses
import time
from collections import deque

import jax
from rich.console import Console

from fastjax import files
from fastjax.errors import Interrupted, ModelError, StorageError
from fastjax.terminal import open_console
from fastjax.train import (
    checkpoint,
    control_files,
    faults,
    health,
    publish,
    record,
    resume,
    start,
)
from fastjax.train.ahead import steps_of
from fastjax.train.batches import DeviceBatch, put_batch
from fastjax.train.compiled import device_bytes
from fastjax.train.evaluate import evaluate, make_eval_step
from fastjax.train.job import Job
from fastjax.train.lock import output_lock
from fastjax.train.metrics import finite
from fastjax.train.progress import Progress
from fastjax.train.reporter import Reporter
from fastjax.train.result import TrainResult
from fastjax.train.selection import Selection
from fastjax.train.signals import StopRequest
from fastjax.train.step import Metrics


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
    progress = Progress(console or open_console(), job.total_steps)
    with (
        output_lock(job.output_dir, progress.note),
        StopRequest() as stop,
        progress,
    ):
        loop = _Loop(job, start.find(job, progress.note), progress, stop)
        try:
            loop.train()
            return loop.finish()
        except OSError:  # of the disk, told or not
            publish.rescue_adapter(
                job, loop.state.trainable, loop.step, note=progress.note
            )
            raise
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; the steps since the newest checkpoint are lost",
                where=loop.newest_checkpoint,
                fix=f"to continue, run {job.resume_command}",
            ) from None
        finally:
            loop.reporter.close()
            newest = loop.newest_checkpoint
            start.hand_back(job, loop.state.trainable, newest, progress.note)


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
        ahead = job.steps_ahead and job.steps_ahead(job)
        self.steps = ahead or steps_of(job, progress.note)
        self._is_told = False
        if job.eval_loader is not None:
            self.eval_step = make_eval_step(job.loss_function(job.eval_loader, None))
        self.selection = Selection(config=config.report)
        self.step_seconds: list[float] = []
        self.keep = config.save_total_limit
        self._in_flight: deque[tuple[int, Metrics, DeviceBatch]] = deque()
        self._mark = self._started = time.perf_counter()
        self._restore(found)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.reporter.close)
            # Last, since it frees the caller's weights.
            self.state = start.start_state(job, found, progress.note)
            on_failure.pop_all()

    def _restore(self, found: resume.Found | None) -> None:
        saved = {} if found is None else found.record
        self.step = self.saved_step = saved.get("step", 0)
        self.bad_steps: int = saved.get("bad_steps", 0)
        self.selection.restore(saved.get("selection", {}))
        self.last_eval: dict[str, float | None] = saved.get("last_eval", {})
        self._seconds_before: float = saved.get("seconds", 0.0)
        run_id = start.run_id(self.job, found)
        self.reporter = Reporter(self.job, self.progress, step=self.step, run_id=run_id)
        self.log = self.reporter.log
        if saved:
            self.log.restore(saved["log"])

    @property
    def newest_checkpoint(self) -> str:
        """Where the run would go on from."""
        folders = checkpoint.checkpoints(self.job.output_dir)
        return str(folders[-1]) if folders else "none yet"

    @property
    def _best_kept(self) -> int | None:
        """Step of the checkpoint that stays because it is the best."""
        return self.selection.best_step if self.selection.is_on else None

    @property
    def seconds(self) -> float:
        """Wall time of all parts of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    def train(self) -> None:
        """Runs the steps that are left."""
        self.progress.start(self.step)
        if self.step == 0 and self.config.report.eval_on_start:
            self._evaluate()
        self._mark = time.perf_counter()
        batch = self._batch_of(self.step)
        if batch is not None:
            self.keep = checkpoint.affordable(
                self.job.output_dir,
                self.state,
                self.config.save_total_limit,
                self.progress.note,
            )
        while batch is not None and not self.selection.should_stop:
            if control_files.take(self.job.output_dir, control_files.STOP):
                self.stop.ask("stop file")
            if self.stop.is_requested:
                self._save_and_stop()
            batch = self._launch(batch)
            self._between_steps()
            self.progress.step(self.step)

    def _between_steps(self) -> None:
        """Reads the metrics of the step before; evaluates and saves when it is time."""
        asked = control_files.take(self.job.output_dir, control_files.SAVE)
        evaluates = self._is_due(self.config.eval_steps)
        saves = self._is_due(self.config.save_steps) or asked
        self._read_metrics(ahead=0 if evaluates or saves else 1)
        is_best = evaluates and self._evaluate()
        if saves or (is_best and self.selection.is_on) or self.selection.should_stop:
            self._save()
        if evaluates or saves:
            self._mark = time.perf_counter()

    def finish(self) -> TrainResult:
        """Publishes the result, unless an earlier run did, and returns the outcome."""
        published = None if self.step_seconds else publish.published_step(self.job)
        was_finished = published is not None
        if was_finished:
            held = self._take_weights_of(published)
            other = f"; the model in memory has those of step {held}, the last"
            self.progress.note(
                f"this run is finished: {self.job.output_dir} holds the weights of "
                f"step {published}{'' if held == published else other}"
            )
        else:
            self._publish()
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

    def _publish(self) -> None:
        """Puts the result, the last or the best weights, at the top of the folder."""
        job, config = self.job, self.config.report
        if self.selection.should_stop:
            self.progress.note(f"stopped early at step {self.step} of {self.total}")
        best = self.selection.best_step if config.load_best_model_at_end else None
        taken = self._take_weights_of(self.step if best is None else best)
        if best not in (None, taken):
            self.progress.note(f"the weights of step {taken}, the last, are the result")
        if job.write_adapter is not None:
            faults.hit("finish:before_adapter", self.step)
            publish.publish_adapter(
                job.output_dir, self.state.trainable, job.write_adapter
            )
            faults.hit("finish:after_adapter", self.step)
        if job.write_model is not None:
            folder = job.output_dir / publish.MODEL_FOLDER
            job.write_model(folder, self.state.trainable)
        # Those of a run that died between its last save and its deletions.
        checkpoint.rotate(job.output_dir, self.keep, self.step, self._best_kept)
        self.reporter.plot()
        self._write_run_file(published_step=taken)

    def _take_weights_of(self, step: int) -> int:
        """Takes those of a checkpoint that is whole; returns the step of those held."""
        if step == self.step:
            return step
        folder = self.job.output_dir / checkpoint.name_of(step)
        like = jax.tree.map(jax.ShapeDtypeStruct.like, self.state)
        try:
            found = resume.named(str(folder))
            checkpoint.require_fitting(folder, like, found.record)
        except ModelError as error:
            self.progress.note(
                f"the best weights cannot be read from {folder.name}: {error.what}"
            )
            return self.step
        self.progress.note(f"the best weights are those of {folder.name}")
        # Else the device would hold the state twice.
        jax.tree.map(lambda leaf: leaf.delete(), self.state)
        self.state = checkpoint.read_state(folder, like, found.record)
        return step

    def _launch(self, batch: DeviceBatch) -> DeviceBatch | None:
        """Starts a step and returns the batch of the next one, on its way."""
        compiled_before = self.steps.compile_seconds
        self.state, metrics = self.steps(self.state, batch)
        self.step += 1
        self._in_flight.append((self.step, metrics, batch))
        if not self._is_told:
            self._is_told = True
            self._report_compilation()
        self._mark += self.steps.compile_seconds - compiled_before
        faults.hit("step", self.step)
        return self._batch_of(self.step)

    def _report_compilation(self) -> None:
        self._write_run_file()
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
            self._check(step, metrics, batch)
            entry = self.log.add(
                step, metrics, batch, epoch=self._epoch(step), seconds=seconds
            )
            if entry is not None:
                self.reporter.metrics(entry, device_bytes("peak_bytes_in_use"))

    def _epoch(self, step: int) -> float:
        return step / max(1, self.job.train_loader.steps_per_epoch)

    def _check(self, step: int, metrics: dict[str, float], batch: DeviceBatch) -> None:
        if step == 1:
            health.require_gradient(metrics)
        self.bad_steps = health.bad_steps_in_row(metrics, self.bad_steps)
        if self.bad_steps >= health.BAD_STEPS_TO_STOP:
            publish.write_bad_batch(self.job.output_dir, step, batch, metrics)
            raise health.diverged(step, metrics, self.newest_checkpoint)
        if metrics["skipped"]:
            self.progress.note(
                f"step {step}: loss {metrics['loss']}, grad_norm "
                f"{metrics['grad_norm']}: the update was left out"
            )

    def _evaluate(self) -> bool:
        """Evaluates and shows samples; returns whether it was the best so far."""
        loader, sampler = self.job.eval_loader, self.job.sampler
        if loader is None:
            return False
        weights = self.state.trainable
        result = evaluate(self.eval_step, weights, self.job.frozen, loader).metrics()
        self.reporter.evaluation(self.step, self._epoch(self.step), result)
        self.last_eval = finite(result)
        if sampler is not None:
            self.reporter.samples(self.step, sampler(weights))
        return self.selection.observe(self.step, result)

    def _save(self) -> None:
        self.log.flush_to_disk()
        content = {
            "identity": start.identity(self.job),
            "run_id": self.reporter.run_id,
            "environment": record.environment(self.config, self.job.remat),
            "seed": self.config.seed,
            "log": self.log.state(),
            "bad_steps": self.bad_steps,
            "selection": self.selection.state(),
            "last_eval": self.last_eval,
            "seconds": self.seconds,
        }
        try:
            folder = checkpoint.save(
                self.job.output_dir,
                self.state,
                content,
                step=self.step,
                write_adapter=self.job.write_adapter,
                keep=self.keep,
                also_keep=self._best_kept,
            )
            self.reporter.plot()
        except StorageError as error:
            goes_on = self.config.report.on_save_error == "continue"
            if not goes_on or self.step == self.total or self.stop.is_requested:
                raise
            self.progress.note(f"{error}\ngoing on without this checkpoint")
            return
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

    def _write_run_file(self, *, published_step: int | None = None) -> None:
        memory = self.steps.memory
        content = {
            "is_finished": published_step is not None,
            "published_step": published_step,
            "total_steps": self.total,
            "data": self.job.train_loader.fingerprint,
            "settings": record.settings(self.config),
            "environment": record.environment(self.config, self.job.remat),
            "implementations": self.steps.implementations,
            "memory": None if memory is None else dataclasses.asdict(memory),
            "compile_seconds": self.steps.compile_seconds,
            "steps_done": self.step,
            "best": self.selection.best,
            "metrics": self._summary(),
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
