"""The gated activation at real shapes, for the benchmark."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program

from .api import gated_activation
from .cases import GPU_CASES, GatedCase


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return tuple(
        Program(
            name=f"gated_mlp.{what}/{case.name}",
            run=functools.partial(run, case.activation),
            arguments=functools.partial(_arguments, case, inputs),
            bytes_moved=arrays * 2 * math.prod(case.shape),
            implementations=("xla",),
        )
        for case in GPU_CASES
        for what, run, inputs, arrays in (
            ("forward", _forward, 2, 3),
            ("backward", _backward, 3, 5),
        )
    )


def _arguments(case: GatedCase, inputs: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), inputs)
    return tuple(jax.random.normal(key, case.shape, jnp.bfloat16) for key in keys)


def _forward(
    activation: str, gate: jax.Array, up: jax.Array, *, implementation: str
) -> jax.Array:
    return gated_activation(
        gate, up, activation=activation, implementation=implementation
    )


def _backward(
    activation: str,
    gate: jax.Array,
    up: jax.Array,
    dout: jax.Array,
    *,
    implementation: str,
) -> Any:
    run = functools.partial(_forward, activation, implementation=implementation)
    return jax.vjp(run, gate, up)[1](dout)
