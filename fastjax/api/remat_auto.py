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
from fastjax.api.benchmark_report import device_bytes
from fastjax.api.memory import Planner, memory_limit
from fastjax.api.random_step import Parts, RandomStep, random_parts, shortened
from fastjax.api.roofline import FRUGAL_PASSES, MATMUL_FLOPS_PER_SECOND, layer_flops
from fastjax.config import RematPolicy
from fastjax.errors import ConfigError, OutOfMemory
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.remat import RematPlan
from fastjax.train.compiled import MEMORY_FIX, StepMemory
from fastjax.train.memory_plan import BatchShape, saved_bytes
from fastjax.train.remat_choice import Choice, PolicyCost, fastest, written_out

# "attention" frees less memory for its time than the others do, so none is left to it.
_POLICIES: tuple[RematPolicy, ...] = ("offload", "layer", "norms")
_PASSES: dict[RematPolicy, tuple[float, float]] = {
    "layer": (3.0, 4.5),
    "offload": (2.6, 3.5),
    "layer_offload": (3.1, 4.5),
}
"""Forward passes of products and of attention that a leaner layer amounts to."""
_FEW, _MORE, _MOST = 2, 4, 8
"""Layers that are timed: the few and the most of the leanest policy, more of others.

A millisecond too much in one of the times is 4 to 9 in 32 layers. With 4 as the most it
was 15.
"""
_WARM_UP_SECONDS, _TIMED = 1.0, 7
_MOST_SECONDS = 2.0
"""Of a step of a few layers at full rate; longer ones are counted, not timed."""
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
      steps: Of the run, 0 when not known.
      note: Is told what is going on.

    Raises:
      ConfigError: The memory to plan for is not known.
      OutOfMemory: With remat "auto", not even the leanest plan fits.
    """
    if planner.config.remat != "auto":
        return planner.remat(planner.config.remat), None
    limit_bytes = memory_limit(planner.config)
    if limit_bytes is None:
        raise ConfigError(
            "remat auto does not know how much memory there is",
            fix="set memory_gib, or remat to one of the policies",
        )
    choice = _automatic(planner, limit_bytes, steps, note or (lambda _: None))
    return choice.remat, choice


def _automatic(
    planner: Planner, limit_bytes: int, steps: int, note: Callable[[str], None]
) -> Choice:
    """Returns the fastest plan whose compiled step fits, with its predicted costs.

    Each policy's step is compiled and timed with a few layers of the model, random
    weights in them.
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
    resident = model.weights + model.trained + model.optimizer
    resident += model.gradients if shape.accumulation > 1 else 0
    most = _MARGIN * limit_bytes
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
        if is_timed and not is_unrolled:
            written = written_out(choice, micro_batches=steps * shape.accumulation)
            choices = [written, choice]
        choice = _compiled_choice(planner, choices, resident, most)
        if choice.bytes <= most:
            choice = choice if is_timed else dataclasses.replace(choice, seconds=None)
            note(f"remat auto: {described(choice, shape)}")
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


def _compiled_choice(
    planner: Planner, choices: Sequence[Choice], resident: int, most: float
) -> Choice:
    """Returns the first that fits, else the last, with all bytes that it needs.

    Written out, a step may need more than scanned.
    """
    tried = choices[0]
    for choice in dict.fromkeys(choices):
        memory = compiled_memory(planner, choice.remat)
        need = memory.total_bytes if memory else choice.bytes + resident
        tried = dataclasses.replace(choice, bytes=float(need))
        if need <= most:
            break
    return tried


def prediction(choice: Choice, shape: BatchShape) -> dict[str, float]:
    """Returns what a plan is predicted to cost; no speed where none was timed."""
    costs = {"peak_gib": choice.bytes / _GIB}
    if choice.seconds is not None:
        costs["tokens_per_second"] = shape.micro_batch_tokens / choice.seconds
    return costs


def described(choice: Choice, shape: BatchShape) -> str:
    """Returns the plan and its predicted costs, for people."""
    predicted = prediction(choice, shape)
    text = f"{choice.remat}; predicted {predicted['peak_gib']:.2f} GiB"
    speed = predicted.get("tokens_per_second")
    return text if speed is None else f"{text} and {speed:,.0f} tokens/s"


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
    few_layers, more_layers, most_layers = (
        min(layers, num_layers - i) for i, layers in ((1, _FEW), (0, _MORE), (0, _MOST))
    )
    flops = most_layers * _flops(planner, FRUGAL_PASSES)
    if not few_layers or flops > _MOST_SECONDS * MATMUL_FLOPS_PER_SECOND:
        return {}
    # A model that is loaded already leaves less room for these layers.
    room = limit_bytes - (device_bytes("bytes_in_use") or 0)
    leanest, *richer = policies
    runs: list[tuple[int, RematPolicy]] = [
        (few_layers, leanest),
        (most_layers, leanest),
        *((more_layers, policy) for policy in richer),
    ]
    few, most, *others = _compiled(planner, runs)
    if not most.fits(room):
        return {}
    few_seconds, most_seconds = (_seconds([short])[0] for short in (few, most))
    layer_seconds = (most_seconds - few_seconds) / (most_layers - few_layers)
    base = few_seconds - few_layers * layer_seconds
    others = [short for short in others if short.fits(room)]
    # One after the other, since each has an embedding and a head.
    timed = [(most, most_seconds), *zip(others, _seconds(others), strict=True)]
    costs: dict[RematPolicy, PolicyCost] = {}
    for short, seconds in timed:
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


class _Short:
    """The step of a model's first layers under one policy, compiled on shapes."""

    def __init__(self, planner: Planner, layers: int, policy: RematPolicy) -> None:
        self.layers = layers
        self.policy: RematPolicy = policy
        self.spec = shortened(planner.spec, layers)
        self.step = RandomStep(
            planner.config,
            self.spec,
            RematPlan(
                policies=(policy,) * layers, is_unrolled=planner.config.unroll_layers
            ),
            dataclasses.replace(planner.shape, accumulation=1),
            parts=_abstract_parts(self.spec),
        )
        self.memory = self.step.compile()

    @property
    def temp_bytes(self) -> int:
        return self.memory.temp_bytes if self.memory else 0

    def fits(self, room: int) -> bool:
        return self.memory is None or self.memory.total_bytes <= room

    def seconds(self, parts: Parts) -> float:
        """Returns the median time of a warm step on these weights."""
        graphdef, trainable, frozen = parts
        # The step takes the trained weights.
        self.step.load((graphdef, jax.tree.map(jnp.copy, trainable), frozen))
        end = time.perf_counter() + _WARM_UP_SECONDS
        seconds, seed = [], 0
        while len(seconds) < _TIMED:
            start = time.perf_counter()
            self.step(seed)
            seed += 1
            if start > end:
                seconds.append(time.perf_counter() - start)
        _delete(self.step.state)
        return statistics.median(seconds)


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
    if not steps:
        return []
    parts = random_parts(steps[0].spec)
    seconds = [step.seconds(parts) for step in steps]
    _delete(parts[1:])
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
    config, spec, shape = planner.config, planner.spec, planner.shape
    parts = _abstract_parts(spec)
    step = RandomStep(config, spec, remat, shape, parts=parts)
    return step.compile()


def _abstract_parts(spec: DecoderSpec) -> Parts:
    graphdef, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    return graphdef, trainable, frozen
