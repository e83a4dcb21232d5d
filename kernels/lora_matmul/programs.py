"""LoRA products at real shapes, for the compile check, the benchmark and the tuner."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.nf4 import mosaic_gpu as nf4
from kernels.nf4 import quantize
from kernels.program import Program, nbytes

from . import accumulate, few_rows, skinny
from .api import lora_matmul_group
from .cases import DECIDING, RATED, Case
from .projection import Projection

_LARGE = (nf4.KERNEL_NAME, accumulate.KERNEL_NAME)
_KERNELS = {
    "forward": (*_LARGE, skinny.PRODUCT_NAME),
    "dx": (*_LARGE, skinny.COTANGENTS_NAME),
    "gradients": (*_LARGE, skinny.COTANGENTS_NAME, skinny.GRADIENT_NAME),
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
    # Few rows are those of decoding, which has no gradients.
    runs: dict[str, Any] = {"forward": _forward}
    readies: list[tuple[str, Any, bool]] = [("ready", _ready_forward, False)]
    if not is_few:
        runs |= {"dx": _dx, "gradients": _gradients}
        readies.append(("ready_dx", _ready_dx, True))
    return (
        *(
            _program(
                case,
                what,
                run,
                functools.partial(_arguments, case, has_douts=what != "forward"),
                kernels=(few_rows.KERNEL_NAME,) if is_few else _KERNELS[what],
                implementations=("mosaic_gpu", "xla"),
                # The gradients' program has the input's among them.
                decides=choice if case in DECIDING and what != "dx" else None,
            )
            for what, run in runs.items()
        ),
        *(
            _program(case, what, run, functools.partial(_ready_arguments, case, is_dx))
            for what, run, is_dx in readies
        ),
    )


def _program(
    case: Case, what: str, run: Any, arguments: Any, **options: Any
) -> Program:
    shapes = jax.eval_shape(arguments)
    results = jax.eval_shape(functools.partial(run, implementation="xla"), *shapes)
    products = math.prod(case.lead) * case.inputs * sum(case.outputs)
    return Program(
        name=f"lora_matmul.{what}/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=nbytes((shapes, results)),
        flops=2 * products,
        **{"implementations": ("xla",), **options},
    )


def _arguments(case: Case, *, has_douts: bool) -> tuple[Any, ...]:
    """Returns x, the projections, and for the backward pass the cotangents."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + 4 * len(case.outputs)))

    def normal(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    projections = tuple(
        Projection(
            quantize(normal((case.inputs, outputs), "bfloat16") * _WEIGHT_DEVIATION),
            lora_a=normal((case.inputs, rank), "float32") * _WEIGHT_DEVIATION,
            lora_b=normal((rank, outputs), "float32") * _WEIGHT_DEVIATION,
            scaling=jnp.float32(1),
        )
        for outputs, rank in zip(case.outputs, case.ranks, strict=True)
    )
    x = normal((*case.lead, case.inputs), "bfloat16")
    if not has_douts:
        return x, projections
    douts = tuple(normal((*case.lead, size), "bfloat16") for size in case.outputs)
    return x, projections, douts


def _ready_arguments(case: Case, is_dx: bool) -> tuple[jax.Array, jax.Array]:
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


def _dx(*arguments: Any, implementation: str) -> jax.Array:
    return _gradients(*arguments, implementation=implementation)[0]


def _ready_forward(
    x: jax.Array, weight: jax.Array, *, implementation: str
) -> jax.Array:
    del implementation  # there is one
    return jnp.dot(x, weight.T)


def _ready_dx(dout: jax.Array, weight: jax.Array, *, implementation: str) -> jax.Array:
    del implementation
    return jnp.dot(dout, weight)
