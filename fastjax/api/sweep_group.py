"""Adapters of equal shapes that train together."""

import contextlib
import copy
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from conversions.hf import folder_fingerprint
from fastjax import runtime
from fastjax.api.language_model import LanguageModel
from fastjax.api.loaders import in_steps
from fastjax.api.loading import add_adapter
from fastjax.api.sweep_member import SweepMember
from fastjax.api.sweep_plan import SweepRun
from fastjax.data import Loader
from fastjax.remat import RematPlan
from fastjax.terminal import say
from fastjax.train import CompiledSteps, Job, init_state, make_optimizer
from fastjax.train.batches import DeviceBatch, put_batch
from fastjax.train.progress import COMPILING
from fastjax.train.step import Metrics
from fastjax.train.sweep import (
    Variant,
    evaluate_sweep,
    item_of,
    make_sweep_eval_step,
    make_sweep_step,
    stacked,
)

_SEED_MASK = 2**32 - 1
"""JAX's keys hold so much of a seed."""


class _Start(NamedTuple):
    """A model with a fresh adapter, taken apart.

    Attributes:
      own: Its scalings.
      trains_head: Whether the table that gives the logits trains.
    """

    graphdef: nnx.GraphDef
    trainable: nnx.State
    own: nnx.State
    frozen: nnx.State
    trains_head: bool


class SweepGroup:
    """Trains runs whose adapters have equal shapes, and writes what they become.

    Attributes:
      step: Steps done.
    """

    def __init__(
        self,
        model: LanguageModel,
        runs: Sequence[SweepRun],
        *,
        loaders: tuple[Loader, Loader | None],
        remat: RematPlan,
        console: Console,
    ) -> None:
        """Gives each run its fresh adapter.

        Args:
          model: The base, without an adapter.
          runs: Of equal shapes.
          loaders: Of the batches that all of them see, and of the held-out rows.
          remat: What the backward pass recomputes.
          console: Takes notes and progress.
        """
        self._model, self._console, self.step = model, console, 0
        starts = [_start(model, run) for run in runs]
        shared = starts[0]
        jobs = [_job(model, run, shared, loaders, remat) for run in runs]
        job = self._job = jobs[0]
        config = job.config
        unit = dataclasses.replace(config.optimizer, learning_rate=1.0)
        optimizer = make_optimizer(unit, job.total_steps)
        variants = [
            _variant(run, start) for run, start in zip(runs, starts, strict=True)
        ]
        self._base = stacked(variants), shared.frozen
        self._states = stacked(
            [init_state(start.trainable, optimizer, config.dtype) for start in starts]
        )
        self._steps = CompiledSteps(
            make_sweep_step(
                job.loss_function(job.train_loader, remat),
                optimizer,
                has_dropout=config.has_dropout,
                dtype=config.dtype,
            ),
            self._base,
            before_compile=lambda: console.print(COMPILING),
            compiler_options=runtime.step_compiler_options(remat.policies),
        )
        if job.eval_loader is not None:
            eval_loss = job.loss_function(job.eval_loader, None)
            self._eval_step = make_sweep_eval_step(eval_loss)
        self._in_flight: deque[tuple[int, Metrics, DeviceBatch]] = deque()
        self._members: list[SweepMember] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            for run, own in zip(runs, jobs, strict=True):
                self._members.append(SweepMember(run, own, console))
            on_failure.pop_all()
        self._started = self._mark = time.perf_counter()

    def train(self) -> None:
        """Runs all steps; ends early when every adapter has diverged."""
        total, job = self._job.total_steps, self._job
        for step in range(total):
            batch = put_batch(job.train_loader, step)
            self._launch(batch)
            evaluates = self._evaluates()
            self._read_metrics(ahead=0 if evaluates or self.step == total else 1)
            if all(member.diverged_at for member in self._members):
                return
            if evaluates:
                self._evaluate()

    def _launch(self, batch: DeviceBatch) -> None:
        """Starts a step; the time to compile it counts for no step."""
        compiled_before = self._steps.compile_seconds
        self._states, metrics = self._steps(self._states, batch)
        self._mark += self._steps.compile_seconds - compiled_before
        self.step += 1
        self._in_flight.append((self.step, metrics, batch))
        if not compiled_before:
            for line in self._steps.report():
                say(self._console, line)
            for member in self._members:
                member.start()

    def _evaluate(self) -> None:
        assert self._job.eval_loader is not None
        weights, loader = self._states.trainable, self._job.eval_loader
        results = evaluate_sweep(self._eval_step, weights, self._base, loader)
        for member, result in zip(self._members, results, strict=True):
            member.evaluated(self.step, result)
        self._mark = time.perf_counter()

    def publish(self) -> None:
        """Writes the folder of each adapter."""
        seconds = time.perf_counter() - self._started
        for index, member in enumerate(self._members):
            weights = item_of(self._states.trainable, index)
            member.publish(self._model, weights, self._steps, seconds=seconds)

    def close(self) -> None:
        """Lets the trackers send what is left."""
        for member in self._members:
            member.close()

    def _evaluates(self) -> bool:
        every = self._job.config.eval_steps
        is_last = self.step == self._job.total_steps
        is_due = is_last or (every > 0 and self.step % every == 0)
        return is_due and self._job.eval_loader is not None

    def _read_metrics(self, *, ahead: int) -> None:
        """Waits for the steps in flight, but for the newest `ahead` ones."""
        while len(self._in_flight) > ahead:
            step, launched, batch = self._in_flight.popleft()
            metrics = {k: np.asarray(v) for k, v in jax.device_get(launched).items()}
            now = time.perf_counter()
            seconds, self._mark = now - self._mark, now
            for index, member in enumerate(self._members):
                own = {name: float(values[index]) for name, values in metrics.items()}
                member.observe(step, own, batch, seconds=seconds)


def _start(model: LanguageModel, run: SweepRun) -> _Start:
    """Returns the model with the run's fresh adapter, taken apart."""
    adapted = copy.copy(model)
    add_adapter(adapted, run.config.lora, seed=run.config.seed)
    scalings = nnx.PathContains("lora_scaling")
    graphdef, trainable, own, frozen = nnx.split(
        adapted.decoder, nnx.Param, scalings, ...
    )
    return _Start(graphdef, trainable, own, frozen, adapted.spec.trains_head)


def _job(
    model: LanguageModel,
    run: SweepRun,
    start: _Start,
    loaders: tuple[Loader, Loader | None],
    remat: RematPlan,
) -> Job:
    train_loader, eval_loader = loaders
    return Job(
        config=in_steps(run.config, train_loader.steps_per_epoch),
        graphdef=start.graphdef,
        trainable=start.trainable,
        frozen=start.frozen,
        train_loader=train_loader,
        eval_loader=eval_loader,
        output_dir=run.folder,
        remat=remat,
        base=folder_fingerprint(model.source.folder),
        head_is_trainable=start.trains_head,
    )


def _variant(run: SweepRun, start: _Start) -> Variant:
    optimizer = make_optimizer(run.config.optimizer, 1)
    return Variant(
        learning_rate=jnp.float32(run.config.optimizer.learning_rate),
        table_factor=jnp.float32(optimizer.table_factor),
        seed=jnp.uint32(run.config.seed & _SEED_MASK),
        own=start.own,
    )
