"""The training step, compiled on shapes while the weights are still being read."""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from fastjax import runtime
from fastjax.train.batches import put_batch
from fastjax.train.compiled import CompiledSteps, KeptSteps
from fastjax.train.job import Job
from fastjax.train.optimizer import make_optimizer
from fastjax.train.progress import COMPILING
from fastjax.train.start import shapes
from fastjax.train.step import make_train_step


def steps_of(
    job: Job, note: Callable[[str], None], *, kept: KeptSteps | None = None
) -> CompiledSteps:
    """Returns the steps of a job, not compiled yet.

    Args:
      job: With weights or their shapes.
      note: Is told when one is about to be compiled.
      kept: Of earlier processes.
    """
    return CompiledSteps(
        make_train_step(
            job.loss_function(job.train_loader, job.remat),
            make_optimizer(job.config.optimizer, job.total_steps),
            seed=job.config.seed,
            has_dropout=job.config.has_dropout,
            dtype=job.config.dtype,
        ),
        job.frozen,
        before_compile=lambda: note(COMPILING),
        compiler_options=runtime.step_compiler_options(
            job.remat.policies if job.remat else ()
        ),
        kept=kept,
    )


def settings_of(job: Job) -> dict[str, Any]:
    """Returns the settings that `steps_of` reads, beside the structure of the model.

    By these a step made beforehand is found: others, such as where the rows come from
    or how often something is logged, leave the program as it is.
    """
    config = job.config
    return {
        "optimizer": config.optimizer,
        "steps": job.total_steps,
        "seed": config.seed,
        "has_dropout": config.has_dropout,
        "dtype": config.dtype,
        "neftune_noise_alpha": config.data.neftune_noise_alpha,
        "cross_entropy": config.implementations.cross_entropy,
        "documents": job.train_loader.max_segments,
        "remat": job.remat,
    }


class StepsAhead:
    """A thread that compiles the first step of a job of shapes."""

    def __init__(
        self,
        job: Job,
        note: Callable[[str], None],
        *,
        kept: KeptSteps | None = None,
    ) -> None:
        """Starts it.

        Args:
          job: With shapes in the place of weights.
          note: Is told when the compilation begins.
          kept: Of earlier processes.
        """
        self._job = job
        self._kept, self._note = kept, note
        pool = ThreadPoolExecutor(1, thread_name_prefix="compile-ahead")
        run = contextvars.copy_context().run
        self._compiled = pool.submit(run, self._compile, note)
        pool.shutdown(wait=False)

    def steps(self, job: Job) -> CompiledSteps | None:
        """Returns the steps for a job with weights; None if it is another one.

        Raises:
          OutOfMemory: The compiler says that the step does not fit.
        """
        if _described(job) != _described(self._job):
            self._note("the model is not as its files said: its step is compiled anew")
            return None
        steps: CompiledSteps = self._compiled.result()
        steps.frozen = job.frozen
        return steps

    def _compile(self, note: Callable[[str], None]) -> CompiledSteps:
        job = self._job
        steps = steps_of(job, note, kept=self._kept)
        steps.compile(shapes(job), put_batch(job.train_loader, 0))
        return steps


def _described(job: Job) -> tuple[Any, ...]:
    """Returns what a compiled step depends on."""
    weights = (job.trainable, job.frozen)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weights)]
    return (
        settings_of(job),
        job.graphdef,
        jax.tree.structure(weights),
        shapes,
        job.train_loader,
        job.head_is_trainable,
    )
