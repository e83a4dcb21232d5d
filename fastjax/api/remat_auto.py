"""Remat "auto": policies measured on a few layers, and the fastest plan that fits."""

import contextvars
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from fastjax import runtime
from fastjax.api.memory import Planner, memory_limit
from fastjax.api.random_step import Parts, RandomStep, random_parts, shortened
from fastjax.api.roofline import FRUGAL_PASSES, MATMUL_FLOPS_PER_SECOND, layer_flops
from fastjax.config import RematPolicy
from fastjax.errors import ConfigError, OutOfMemory
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.remat import RematPlan
from fastjax.train.compiled import MEMORY_FIX, StepMemory, device_bytes
from fastjax.train.memory_plan import BatchShape, saved_bytes
from fastjax.train.remat_choice import Choice, PolicyCost, fastest, written_out
from kernels.device import HOPPER, compute_capability

# "attention" frees less memory for its time than the others do, so none is left to it.
_POLICIES: tuple[RematPolicy, ...] = ("offload", "layer", "norms")
_PASSES: dict[RematPolicy, tuple[float, float]] = {
    "layer": (3.0, 4.5),
    "offload": (2.6, 3.5),
    "layer_offload": (3.1, 4.5),
}
"""Forward passes of products and of attention that a leaner layer amounts to."""
_FEW, _MORE = 2, 4
"""Layers that are timed: few of the leanest policy, more of each."""
_WARM_UP_SECONDS, _WARM_UP_STEPS, _TIMED = 1.0, 3, 7
_MOST_SECONDS = 2.0
"""Of a step of a few layers at full rate; longer ones are counted, not timed."""
_TIMED_WHOLE, _MOST_WHOLE_SECONDS = 3, 5.0
"""Steps of the whole model that are timed, and what one of them may take."""
_MARGIN = 0.995
"""Share of the limit that the compiler may plan with; the allocator needs the rest."""
_SURELY = 0.85
"""Share of the limit that the formula may come to if a step is to fit surely."""
_GIB = 2**30


def planned_remat(
    planner: Planner,
    *,
    steps: int = 0,
    note: Callable[[str], None] | None = None,
) -> tuple[RematPlan, Choice | None]:
    """Returns the plan of a run, and with remat "auto" its predicted costs.

    Args:
      planner: Of the run.
      steps: Of the run, for each shape that is compiled; 0 when not known.
      note: Is told what is going on.

    Raises:
      ConfigError: The memory to plan for is not known.
      OutOfMemory: With remat "auto", not even the leanest plan fits.
    """
    note = note or (lambda _: None)
    if planner.config.remat != "auto":
        return _written_out_where_it_pays(planner, steps, note), None
    limit_bytes = memory_limit(planner.config)
    if limit_bytes is None:
        raise ConfigError(
            "remat auto does not know how much memory there is",
            fix="set memory_gib, or remat to one of the policies",
        )
    choice = _automatic(planner, limit_bytes, steps, note)
    return choice.remat, choice


def _written_out_where_it_pays(
    planner: Planner, steps: int, note: Callable[[str], None]
) -> RematPlan:
    """Returns the plan of the one policy that was asked for.

    A step counts with the time that its products take at the least: the measured gains
    are of the kernels on Hopper, and other devices scan.
    """
    plan = planner.remat(planner.policy)
    if planner.config.unroll_layers is not None or compute_capability() != HOPPER:
        return plan
    flops = len(plan.policies) * _flops(planner, FRUGAL_PASSES)
    choice = Choice(remat=plan, seconds=flops / MATMUL_FLOPS_PER_SECOND, bytes=0.0)
    micro_batches = steps * planner.shape.accumulation
    written = written_out(choice, micro_batches=micro_batches).remat
    if written.is_unrolled:
        note("a run of this length gains by layers that are written out in the program")
    return written


def _automatic(
    planner: Planner, limit_bytes: int, steps: int, note: Callable[[str], None]
) -> Choice:
    """Returns the fastest plan whose compiled step fits, with its predicted costs.

    Each policy's step is compiled and timed with a few layers of the model, random
    weights in them; so is then the whole step of the plan.
    """
    spec, shape, model = planner.spec, planner.shape, planner.model
    # The optimiser's states may wait there too.
    host_bytes = float(runtime.host_limit_bytes() - model.host)
    is_unrolled = planner.remat("none").is_unrolled
    # Where all fits that layers may keep, nothing is faster.
    fits = planner.plan("none").peak < _SURELY * limit_bytes
    policies: tuple[RematPolicy, ...] = ("none",) if fits else _POLICIES
    note(f"remat auto: timing a few layers with {', '.join(policies)}")
    costs = _measured(planner, policies, limit_bytes)
    is_timed = bool(costs)
    if not is_timed:
        note("remat auto: layers are not timed here, the plan goes by their products")
        costs = _counted(planner, policies[-1])
    resident, most = _resident_bytes(planner), _MARGIN * limit_bytes
    room = most - resident
    find = functools.partial(
        fastest,
        num_layers=spec.config.num_hidden_layers,
        host_limit_bytes=host_bytes,
        is_unrolled=is_unrolled,
    )
    leanest: RematPolicy = next(
        policy for policy in ("layer_offload", *_POLICIES, "none") if policy in costs
    )
    for is_last in (False, False, True):
        choice = None if is_last else find(costs, limit_bytes=room)
        # A step of several policies may take more than their sum, one of one does not.
        choice = choice or find({leanest: costs[leanest]}, limit_bytes=math.inf)
        if choice is None:
            break
        choices = [choice]
        if is_timed and planner.config.unroll_layers is None:
            written = written_out(choice, micro_batches=steps * shape.accumulation)
            choices = list(dict.fromkeys([written, choice]))
        choice, trial = _compiled_choice(planner, choices, resident, most)
        if choice.bytes <= most:
            if is_timed:
                choice = _timed(planner, choice, trial, limit_bytes)
            else:
                choice = dataclasses.replace(choice, seconds=None)
            note(f"remat auto: {choice.described(shape.micro_batch_tokens)}")
            return choice
        if set(choice.remat.policies) == {leanest}:
            break
        room -= choice.bytes - most
    raise OutOfMemory(
        f"no remat plan fits within {limit_bytes / _GIB:.2f} GiB of the device and "
        f"{host_bytes / _GIB:.0f} GiB of pinned host memory",
        where=f"{shape.rows} rows of {shape.tokens:,} tokens",
        fix=MEMORY_FIX,
    )


def _resident_bytes(planner: Planner) -> int:
    """Returns what lies on the device through the whole step."""
    model = planner.model
    summed = model.gradients if planner.shape.accumulation > 1 else 0
    return model.weights + model.trained + model.optimizer + summed


def _compiled_choice(
    planner: Planner, choices: Sequence[Choice], resident: int, most: float
) -> tuple[Choice, "_Trial"]:
    """Returns the first that fits, else the last, with all bytes that it needs.

    Written out, a step may need more than scanned.
    """
    choice, *others = choices
    trial = _Trial(planner, planner.spec, choice.remat, planner.shape)
    need = trial.memory.total_bytes if trial.memory else choice.bytes + resident
    if need > most and others:
        return _compiled_choice(planner, others, resident, most)
    return dataclasses.replace(choice, bytes=float(need)), trial


def _timed(
    planner: Planner, choice: Choice, trial: "_Trial", limit_bytes: int
) -> Choice:
    """Returns the choice with the time that its whole step takes, if that is short.

    Few layers do not tell how fast a host takes the copies of all.
    """
    assert choice.seconds is not None
    micro_batches = planner.shape.accumulation
    is_short = micro_batches * choice.seconds <= _MOST_WHOLE_SECONDS
    if not is_short or not trial.fits(limit_bytes):
        return choice
    parts = random_parts(planner.spec)
    seconds = trial.seconds(parts, _TIMED_WHOLE) / micro_batches
    _delete(parts[1:])
    return dataclasses.replace(choice, seconds=seconds)


def _counted(planner: Planner, richest: RematPolicy) -> dict[RematPolicy, PolicyCost]:
    """Returns the costs by the closed formula: operations in the place of seconds.

    Of the policies that project nothing again `richest` alone: by count they are alike.
    """
    all_passes: dict[RematPolicy, tuple[float, float]] = {
        **_PASSES,
        richest: FRUGAL_PASSES,
    }
    return {
        policy: PolicyCost(
            base_seconds=0.0,
            base_bytes=planner.plan(policy).workspace,
            layer_seconds=_flops(planner, passes),
            layer_bytes=kept,
            layer_host_bytes=host,
        )
        for policy, passes in all_passes.items()
        for kept, host in [_kept_bytes(planner, policy)]
    }


def _flops(planner: Planner, passes: tuple[float, float]) -> float:
    """Returns the operations of a layer for a micro-batch."""
    shape = planner.shape
    a_token = layer_flops(planner.spec.config, shape.tokens, passes)
    return shape.micro_batch_tokens * a_token


def _kept_bytes(planner: Planner, policy: RematPolicy) -> tuple[float, float]:
    """Returns what a layer keeps of a micro-batch: on the device, on the host."""
    kept, host = saved_bytes(planner.spec, 0, policy)
    tokens = planner.shape.micro_batch_tokens
    return float(kept * tokens), float(host * tokens)


def _measured(
    planner: Planner,
    policies: Sequence[RematPolicy],
    limit_bytes: int,
) -> dict[RematPolicy, PolicyCost]:
    """Returns the costs of the policies of which a few layers fit.

    The step without layers takes the same time under each, so that it is measured for
    the leanest of them alone, the first. The bytes that a layer keeps, with the
    gradients of its adapters, are counted, not measured. Nothing is returned where that
    one does not fit, where a step would take long, or where the model has one layer, of
    which no line can be drawn.
    """
    num_layers = planner.spec.config.num_hidden_layers
    more_layers = min(_MORE, num_layers)
    few_layers = min(_FEW, num_layers - 1)
    flops = more_layers * _flops(planner, FRUGAL_PASSES)
    if not few_layers or flops > _MOST_SECONDS * MATMUL_FLOPS_PER_SECOND:
        return {}
    few, *shorts = _compiled(
        planner,
        [(few_layers, policies[0]), *((more_layers, policy) for policy in policies)],
    )
    if not shorts[0].fits(limit_bytes):
        return {}
    shorts = [short for short in shorts if short.fits(limit_bytes)]
    # One after the other, since each has an embedding and a head.
    (few_seconds,), all_seconds = _seconds([few]), _seconds(shorts)
    layer_seconds = (all_seconds[0] - few_seconds) / (more_layers - few_layers)
    base = few_seconds - few_layers * layer_seconds
    costs: dict[RematPolicy, PolicyCost] = {}
    for short, seconds in zip(shorts, all_seconds, strict=True):
        kept, host = _kept_bytes(planner, short.policy)
        kept += planner.model.gradients // num_layers
        costs[short.policy] = PolicyCost(
            base_seconds=base,
            base_bytes=short.temp_bytes - short.layers * kept,
            layer_seconds=(seconds - base) / short.layers,
            layer_bytes=kept,
            layer_host_bytes=host,
        )
    if "layer" in costs:  # takes as long: its copies run beside the kernels
        kept, host = _kept_bytes(planner, "layer_offload")
        kept += planner.model.gradients // num_layers
        costs["layer_offload"] = dataclasses.replace(
            costs["layer"], layer_bytes=kept, layer_host_bytes=host
        )
    return costs


class _Trial:
    """A training step that is compiled on shapes, and may be timed on random weights.

    Attributes:
      memory: What the compiler plans; None where it does not tell.
    """

    def __init__(
        self, planner: Planner, spec: DecoderSpec, remat: RematPlan, shape: BatchShape
    ) -> None:
        parts = _abstract_parts(spec)
        self._step = RandomStep(planner.config, spec, remat, shape, parts=parts)
        self.memory = self._step.compile()

    def fits(self, limit_bytes: int) -> bool:
        """Returns whether the step fits beside what the device holds now."""
        if self.memory is None:
            return True
        held = device_bytes("bytes_in_use") or 0
        return self.memory.total_bytes <= limit_bytes - held

    def seconds(self, parts: Parts, timed: int) -> float:
        """Returns the median time of so many warm steps, which consume the adapters."""
        self._step.load(parts)
        begun, seed, seconds = time.perf_counter(), 0, []
        while len(seconds) < timed:
            start = time.perf_counter()
            self._step(seed)
            seed += 1
            # The first one takes as long as the host needs to pin its memory.
            if seed > _WARM_UP_STEPS and start > begun + _WARM_UP_SECONDS:
                seconds.append(time.perf_counter() - start)
        _delete(self._step.state)
        return statistics.median(seconds)


class _Short(_Trial):
    """The step of a model's first layers under one policy."""

    def __init__(self, planner: Planner, layers: int, policy: RematPolicy) -> None:
        self.layers = layers
        self.policy: RematPolicy = policy
        self.spec = shortened(planner.spec, layers)
        is_unrolled = bool(planner.config.unroll_layers)
        remat = RematPlan(policies=(policy,) * layers, is_unrolled=is_unrolled)
        shape = dataclasses.replace(planner.shape, accumulation=1)
        super().__init__(planner, self.spec, remat, shape)

    @property
    def temp_bytes(self) -> int:
        return self.memory.temp_bytes if self.memory else 0


def _compiled(
    planner: Planner, runs: Sequence[tuple[int, RematPolicy]]
) -> list[_Short]:
    """Returns the compiled steps of so many layers and policies, made side by side."""

    def make(run: tuple[contextvars.Context, tuple[int, RematPolicy]]) -> _Short:
        context, (layers, policy) = run
        return context.run(_Short, planner, layers, policy)

    contexts = [contextvars.copy_context() for _ in runs]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(make, zip(contexts, runs, strict=True)))


def _seconds(steps: Sequence[_Short]) -> list[float]:
    """Returns the time of each step of the same layers, on the same random weights."""
    graphdef, trainable, frozen = random_parts(steps[0].spec)
    seconds = [
        step.seconds((graphdef, jax.tree.map(jnp.copy, trainable), frozen), _TIMED)
        for step in steps
    ]
    _delete((trainable, frozen))
    return seconds


def _delete(arrays: PyTree) -> None:
    """Gives memory back now, which Python would when it next looks for cycles."""
    for array in jax.tree.leaves(arrays):
        array.delete()


def compiled_memory(planner: Planner, remat: RematPlan) -> StepMemory | None:
    """Returns what the whole step needs, by compiling it on shapes alone.

    Args:
      planner: Of the run.
      remat: What the backward pass recomputes.
    """
    return _Trial(planner, planner.spec, remat, planner.shape).memory


def _abstract_parts(spec: DecoderSpec) -> Parts:
    graphdef, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    return graphdef, trainable, frozen
