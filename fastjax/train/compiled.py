"""Steps compiled ahead of their first call: time, memory and choices are known."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PyTree

from fastjax.errors import OutOfMemory
from fastjax.train.batches import DeviceBatch
from fastjax.train.state import TrainState
from fastjax.train.step import Metrics
from kernels import dispatch
from kernels.side_by_side import compiled_side_by_side

MEMORY_FIX = (
    "halve per_device_train_batch_size and double gradient_accumulation_steps, or set "
    "remat to layer, or lower max_length"
)
"""What helps when the training step does not fit."""

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What XLA plans for one step, in bytes.

    Attributes:
      argument_bytes: State, frozen weights and batch.
      output_bytes: New state and metrics.
      alias_bytes: Outputs that live where donated arguments were.
      temp_bytes: Activations, gradients and workspace.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that exists at once."""
        fresh = self.output_bytes - self.alias_bytes
        return self.argument_bytes + fresh + self.temp_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompiledStep:
    """A step for one shape of batch.

    Attributes:
      run: The compiled program.
      memory: What it needs; None where the backend does not tell.
      implementations: Op to the implementations that its calls took.
    """

    run: Any
    memory: StepMemory | None
    implementations: dict[str, list[str]]


@runtime_checkable
class KeptSteps(Protocol):
    """Steps of earlier processes."""

    def load(self, arguments: tuple[Any, ...]) -> CompiledStep | None: ...

    def store(self, arguments: tuple[Any, ...], step: CompiledStep) -> None: ...


class CompiledSteps:
    """Keeps a compiled step for each shape of batch.

    Attributes:
      frozen: Weights that every step reads, or their shapes while none runs.
      compile_seconds: Sum over shapes.
      is_cached: Whether all programs were read from the compilation cache.
      memory: Of the shape that needs most; None where the backend does not tell.
      implementations: Op to the implementations that its calls took.
    """

    def __init__(
        self,
        jitted: Any,
        frozen: PyTree,
        before_compile: Callable[[], None],
        *,
        compiler_options: Mapping[str, Any] | None = None,
        kept: KeptSteps | None = None,
    ) -> None:
        self.compile_seconds = 0.0
        self.is_cached = True
        self.memory: StepMemory | None = None
        self.implementations: dict[str, list[str]] = {}
        self._jitted, self.frozen = jitted, frozen
        self._before_compile = before_compile
        self._compiler_options = dict(compiler_options or {})
        self._kept = kept
        self._steps: dict[tuple[int, ...], Any] = {}

    def __call__(
        self, state: TrainState, batch: DeviceBatch
    ) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics, which the device may still owe."""
        if batch.shape not in self._steps:
            self.compile(state, batch)
        step = self._steps[batch.shape]
        with out_of_memory(self.memory):
            return step(state, self.frozen, batch.arrays)

    def program_text(self) -> str:
        """Returns the compiled program of the last shape, as XLA writes it."""
        return next(reversed(self._steps.values())).as_text()

    def report(self) -> list[str]:
        """Returns what a user may want to know of the compiled step."""
        how = "read from the cache" if self.is_cached else "compiled"
        lines = [f"{how} in {self.compile_seconds:.1f} s"]
        if self.memory is not None:
            lines[0] += f"; the step needs {self.memory.total_bytes / 2**30:.2f} GiB"
        chosen = [
            f"{op}={'+'.join(n)}" for op, n in sorted(self.implementations.items())
        ]
        return [*lines, "implementations: " + ", ".join(chosen)] if chosen else lines

    def compile(self, state: TrainState, batch: DeviceBatch) -> None:
        """Compiles the step for one shape of batch.

        Args:
          state: Its arrays, or their shapes.
          batch: Of that shape.
        """
        start = time.perf_counter()
        arguments = (state, self.frozen, batch.arrays)
        made = None if self._kept is None else self._kept.load(arguments)
        if made is None:
            made, is_fresh = self._made(arguments)
            self.is_cached = self.is_cached and not is_fresh
            # What XLA has read from its own cache cannot be written on every backend.
            if self._kept is not None and is_fresh:
                self._kept.store(arguments, made)
        self._steps[batch.shape] = made.run
        self.compile_seconds += time.perf_counter() - start
        needs = [plan for plan in (self.memory, made.memory) if plan]
        self.memory = max(needs, key=lambda plan: plan.total_bytes, default=None)
        for op, names in made.implementations.items():
            known = set(self.implementations.get(op, ()))
            self.implementations[op] = sorted(known | set(names))

    def _made(self, arguments: tuple[Any, ...]) -> tuple[CompiledStep, bool]:
        """Returns the step, and whether XLA has compiled it now."""
        self._before_compile()
        with (
            dispatch.record() as chosen,
            out_of_memory(None),
            compiled_side_by_side(),
        ):
            lowered = self._jitted.lower(*arguments)
            with cache_hits() as hits:
                run = lowered.compile(compiler_options=self._compiler_options)
        implementations = {op: sorted(names) for op, names in chosen.items()}
        memory = step_memory(run)
        made = CompiledStep(run=run, memory=memory, implementations=implementations)
        return made, not hits


def step_memory(compiled: Any) -> StepMemory | None:
    """Returns the memory plan of a compiled function, None where there is none."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return StepMemory(
        argument_bytes=plan.argument_size_in_bytes,
        output_bytes=plan.output_size_in_bytes,
        alias_bytes=plan.alias_size_in_bytes,
        temp_bytes=plan.temp_size_in_bytes,
    )


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Gathers an event for each program that this thread has from XLA's cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event == _CACHE_HIT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def device_bytes(name: str) -> int | None:
    """Returns a number of the device's allocator, None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get(name)


@contextlib.contextmanager
def out_of_memory(memory: StepMemory | None) -> Iterator[None]:
    """Turns the device's lack of memory into an `OutOfMemory` that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        need = f"{memory.total_bytes / 2**30:.2f} GiB" if memory else "more memory"
        raise OutOfMemory(
            f"the step needs {need} than the device has free"
            if memory is None
            else f"the step needs {need}, more than the device has free",
            where=str(error).splitlines()[0][:200],
            fix=MEMORY_FIX,
        ) from error
