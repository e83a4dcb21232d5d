"""LoRA products at real shapes, for the compile check, the benchmark and the tuner."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.line import as_lines
from kernels.nf4 import mosaic_gpu as nf4
from kernels.nf4 import quantize
from kernels.program import Program, moved_bytes

from . import (
    accumulate,
    few_rows,
    low_rank_cotangents,
    mosaic_gpu,
    operands,
    skinny,
    xla,
)
from .api import lora_matmul_group
from .cases import DECIDING, RATED, Case
from .projection import Projection

_LARGE = (nf4.KERNEL_NAME, accumulate.KERNEL_NAME)
_KERNELS = {
    "forward": (*_LARGE, skinny.PRODUCT_NAME, operands.NARROW_NAME),
    "dx": (*_LARGE, low_rank_cotangents.KERNEL_NAME),
    "gradients": (*_LARGE, low_rank_cotangents.KERNEL_NAME, skinny.GRADIENT_NAME),
}
_WEIGHT_DEVIATION = 0.02

Trained = tuple[dict[str, jax.Array], ...]


def programs() -> tuple[Program, ...]:
    """Returns every program of the op.

    "ready" is cuBLAS on weights that are in memory as bfloat16, without an adapter:
    what the others are to come close to.
    """
    return tuple(program for case in RATED for program in _programs(case))


def _programs(case: Case) -> tuple[Program, ...]:
    is_few = math.prod(case.lead) <= few_rows.MAX_ROWS
    sizes = {"rows": math.prod(case.lead), "inputs": case.inputs}
    choice = ("lora_matmul", {**sizes, "outputs": sum(case.outputs)})
    ready = _program(case, "ready", _ready_forward, _ready_arguments)
    # Few rows are those of decoding, which has no gradients.
    runs: dict[str, tuple[Any, Any, Program | None]]
    runs = {"forward": (_forward, _arguments, ready)}
    if not is_few:
        arguments = functools.partial(_ready_arguments, is_dx=True)
        ready_dx = _program(case, "ready_dx", _ready_dx, arguments)
        runs["dx"] = (_dx, _saved_arguments, ready_dx)
        if case in DECIDING or max(case.ranks) > 16:
            runs["gradients"] = (_gradients, _cotangent_arguments, None)
    kernels = (
        _program(
            case,
            what,
            run,
            arguments,
            kernels=(few_rows.KERNEL_NAME,) if is_few else _KERNELS[what],
            implementations=("mosaic_gpu", "xla"),
            # The gradients' program has the input's among them.
            decides=choice if case in DECIDING and what != "dx" else None,
            rival=rival,
        )
        for what, (run, arguments, rival) in runs.items()
    )
    return (*kernels, *(rival for _, _, rival in runs.values() if rival))


def _program(
    case: Case, what: str, run: Any, arguments: Any, **options: Any
) -> Program:
    arguments = functools.partial(arguments, case)
    products = math.prod(case.lead) * case.inputs * sum(case.outputs)
    return Program(
        name=f"lora_matmul.{what}/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=moved_bytes(run, arguments),
        flops=2 * products,
        **{"implementations": ("xla",), **options},
    )


def _arguments(case: Case) -> tuple[Any, ...]:
    """Returns x and the projections."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + 4 * len(case.outputs)))

    def normal(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    projections = tuple(
        Projection(
            quantize(normal((case.inputs, outputs), "bfloat16") * _WEIGHT_DEVIATION),
            lora_a=normal((case.inputs, rank), "float32") * _WEIGHT_DEVIATION,
            lora_b=normal((rank, outputs), "float32") * _WEIGHT_DEVIATION,
            scaling=as_lines(1),
        )
        for outputs, rank in zip(case.outputs, case.ranks, strict=True)
    )
    return normal((*case.lead, case.inputs), "bfloat16"), projections


def _cotangent_arguments(case: Case) -> tuple[Any, ...]:
    """Returns x, the projections and the outputs' cotangents."""
    keys = jax.random.split(jax.random.key(1), len(case.outputs))
    douts = tuple(
        jax.random.normal(key, (*case.lead, outputs), jnp.bfloat16)
        for key, outputs in zip(keys, case.outputs, strict=True)
    )
    return *_arguments(case), douts


def _saved_arguments(case: Case) -> tuple[Any, ...]:
    """Returns what the backward pass reads: all `x @ a` of the forward pass too."""
    shape = (*case.lead, sum(case.ranks))
    xa = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    return *_cotangent_arguments(case), operands.filled_columns(xa)


def _ready_arguments(case: Case, is_dx: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns x, or the joined cotangents, and the joined weights as (O, I)."""
    outputs, keys = sum(case.outputs), jax.random.split(jax.random.key(0))
    features = outputs if is_dx else case.inputs
    lhs = jax.random.normal(keys[0], (*case.lead, features), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (outputs, case.inputs), jnp.bfloat16)
    return lhs, weight * _WEIGHT_DEVIATION


def _forward(
    x: jax.Array, projections: tuple[Projection, ...], *, implementation: str
) -> tuple[jax.Array, ...]:
    return lora_matmul_group(x, projections, implementation=implementation)


def _gradients(
    x: jax.Array,
    projections: tuple[Projection, ...],
    douts: tuple[jax.Array, ...],
    *,
    implementation: str,
) -> tuple[jax.Array, Trained]:
    """Returns the cotangents of x and of the adapters; the outputs are not computed."""

    def run(x: jax.Array, trained: Trained) -> tuple[jax.Array, ...]:
        adapted = tuple(
            Projection(p.weight, scaling=p.scaling, **own)
            for p, own in zip(projections, trained, strict=True)
        )
        return _forward(x, adapted, implementation=implementation)

    trained = tuple({"lora_a": p.lora_a, "lora_b": p.lora_b} for p in projections)
    return jax.vjp(run, x, trained)[1](douts)


def _dx(
    x: jax.Array,
    projections: tuple[Projection, ...],
    douts: tuple[jax.Array, ...],
    xa: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Returns the cotangent of x; a kernel that makes it makes those of `b` too."""
    nothing = (None,) * len(projections)
    if implementation == "xla":
        borders = [*itertools.accumulate(operands.widths_of(projections))]
        parts = tuple(jnp.split(xa, borders, axis=1)[: len(projections)])
        apart = xla.Residuals(x, projections, nothing, parts, nothing)
        return xla.backward(0.0, apart, douts)[0]
    mosaic_gpu.check(0.0, x, projections, nothing)
    saved = mosaic_gpu.Residuals(x, projections, xa)
    return mosaic_gpu.backward(0.0, saved, douts)[0]


def _ready_forward(
    x: jax.Array, weight: jax.Array, *, implementation: str
) -> jax.Array:
    del implementation  # there is one
    return jnp.dot(x, weight.T)


def _ready_dx(dout: jax.Array, weight: jax.Array, *, implementation: str) -> jax.Array:
    del implementation
    return jnp.dot(dout, weight)
