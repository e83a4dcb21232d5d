"""Remat "auto": policies measured on a few layers, and the fastest plan that fits."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fastjax.api.memory import Planner, memory_limit
from fastjax.api.random_step import RandomStep, random_parts
from fastjax.config import RematPolicy
from fastjax.errors import ConfigError, OutOfMemory
from fastjax.models.build import DecoderSpec, abstract_decoder
from fastjax.remat import RematPlan
from fastjax.train.compiled import MEMORY_FIX, StepMemory
from fastjax.train.memory_plan import UNROLLED_SLACK, BatchShape, saved_bytes
from fastjax.train.remat_choice import Choice, PolicyCost, fastest

# "attention" frees less memory for its time than the others do, so none is left to it.
_POLICIES: tuple[RematPolicy, ...] = ("offload", "layer", "none")
_FEW, _MORE = 2, 4
_WARM_UP, _TIMED = 2, 5
_MARGIN = 0.98
"""Share of the limit that the compiler may plan with; the allocator needs the rest."""
_ATTEMPTS = 3
_GIB = 2**30


def planned_remat(
    planner: Planner,
    *,
    documents: int | None = 1,
    note: Callable[[str], None] | None = None,
) -> tuple[RematPlan, Choice | None]:
    """Returns the plan of a run, and with remat "auto" its predicted costs.

    Args:
      planner: Of the run.
      documents: Most of a row, None when not known.
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
            fix="set memory_gib, or remat to none, attention, layer or offload",
        )
    choice = _automatic(planner, limit_bytes, documents or 1, note or (lambda _: None))
    return choice.remat, choice


def _automatic(
    planner: Planner, limit_bytes: int, documents: int, note: Callable[[str], None]
) -> Choice:
    """Returns the fastest plan whose compiled step fits, with its predicted costs.

    Each policy's step is compiled and timed with a few layers of the model, random
    weights in them.
    """
    note("remat auto: timing a few layers under each policy")
    spec, shape, model = planner.spec, planner.shape, planner.model
    is_unrolled = planner.remat("none").is_unrolled
    costs = _measured(planner, limit_bytes, documents)
    resident = model.weights + model.trained + model.optimizer
    resident += model.gradients if shape.accumulation > 1 else 0
    planned = _MARGIN * limit_bytes
    for _ in range(_ATTEMPTS):
        choice = fastest(
            costs,
            num_layers=spec.config.num_hidden_layers,
            limit_bytes=planned - resident,
            is_unrolled=is_unrolled,
        )
        if choice is None:
            break
        memory = compiled_memory(planner, choice.remat, documents=documents)
        need = memory.total_bytes if memory else choice.bytes + resident
        if need <= _MARGIN * limit_bytes:
            choice = dataclasses.replace(choice, bytes=need)
            note(f"remat auto: {described(choice, shape)}")
            return choice
        planned -= need - _MARGIN * limit_bytes
    raise OutOfMemory(
        f"no remat plan fits within {limit_bytes / _GIB:.2f} GiB",
        where=f"{shape.rows} rows of {shape.tokens:,} tokens",
        fix=MEMORY_FIX,
    )


def prediction(choice: Choice, shape: BatchShape) -> dict[str, float]:
    """Returns what a plan is predicted to cost."""
    return {
        "peak_gib": choice.bytes / _GIB,
        "tokens_per_second": shape.micro_batch_tokens / choice.seconds,
    }


def described(choice: Choice, shape: BatchShape) -> str:
    """Returns the plan and its predicted costs, for people."""
    predicted = prediction(choice, shape)
    return (
        f"{choice.remat}; predicted {predicted['peak_gib']:.2f} GiB and "
        f"{predicted['tokens_per_second']:,.0f} tokens/s"
    )


def _measured(
    planner: Planner, limit_bytes: int, documents: int
) -> dict[RematPolicy, PolicyCost]:
    """Returns the costs of the policies of which a few layers fit.

    The step without layers takes the same time under each, so that it is measured for
    the leanest alone. The bytes that a layer keeps are counted, not measured.
    """
    is_unrolled = planner.remat("none").is_unrolled
    # One after the other, since each has an embedding and a head.
    few = _Short(planner, _FEW, documents).measured(_POLICIES[0], limit_bytes)
    if few is None:
        return {}
    more = _Short(planner, _MORE, documents)
    base = 0.0
    costs: dict[RematPolicy, PolicyCost] = {}
    for policy in _POLICIES:
        found = more.measured(policy, limit_bytes)
        if found is None:
            continue
        seconds, used = found
        if not costs:
            base = few[0] - _FEW * (seconds - few[0]) / (_MORE - _FEW)
        kept = saved_bytes(planner.spec, 0, policy)[0]
        kept *= planner.shape.micro_batch_tokens
        kept *= UNROLLED_SLACK if is_unrolled and policy == "none" else 1
        costs[policy] = PolicyCost(
            base_seconds=base,
            base_bytes=used - _MORE * kept,
            layer_seconds=(seconds - base) / _MORE,
            layer_bytes=kept,
        )
    return costs


class _Short:
    """The first layers of a model, random weights in them."""

    def __init__(self, planner: Planner, layers: int, documents: int) -> None:
        self._config, self._spec = planner.config, shortened(planner.spec, layers)
        self._shape = dataclasses.replace(planner.shape, accumulation=1)
        self._layers, self._documents = layers, documents
        self._parts = random_parts(self._spec)

    def measured(
        self, policy: RematPolicy, limit_bytes: int
    ) -> tuple[float, int] | None:
        """Returns seconds and bytes of a step, None where it does not fit."""
        remat = RematPlan(
            policies=(policy,) * self._layers, is_unrolled=self._config.unroll_layers
        )
        graphdef, trainable, frozen = self._parts
        # The step takes the trained weights.
        parts = graphdef, jax.tree.map(jnp.copy, trainable), frozen
        step = RandomStep(
            self._config,
            self._spec,
            remat,
            self._shape,
            documents=self._documents,
            parts=parts,
        )
        memory = step.compile()
        if memory is not None and memory.total_bytes > limit_bytes:
            return None
        return _seconds(step), memory.temp_bytes if memory else 0


def _seconds(step: RandomStep) -> float:
    """Returns the median time of a warm step."""
    seconds = []
    for seed in range(_WARM_UP + _TIMED):
        start = time.perf_counter()
        step(seed)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])


def compiled_memory(
    planner: Planner, remat: RematPlan, *, documents: int = 1
) -> StepMemory | None:
    """Returns what the whole step needs, by compiling it on shapes alone.

    Args:
      planner: Of the run.
      remat: What the backward pass recomputes.
      documents: Most of a row.
    """
    config, spec, shape = planner.config, planner.spec, planner.shape
    graphdef, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    parts = graphdef, trainable, frozen
    step = RandomStep(config, spec, remat, shape, documents=documents, parts=parts)
    return step.compile()


def shortened(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """Returns the structure with so many layers, the first ones."""
    config = spec.config
    few = dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_windows=tuple(itertools.islice(itertools.cycle(config.windows), layers)),
        layers_without_rope=tuple(i for i in config.layers_without_rope if i < layers),
    )
    return dataclasses.replace(spec, config=few)
