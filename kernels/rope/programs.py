"""The rotary embedding at real shapes, for the compile check and the benchmark."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from .api import rope
from .cases import GPU_CASES, RopeCase
from .tables import rotary_tables


def programs() -> tuple[Program, ...]:
    """Returns every program of the op; the backward is the same rotation."""
    return tuple(map(_program, GPU_CASES))


def _program(case: RopeCase) -> Program:
    arguments = functools.partial(_arguments, case)
    return Program(
        name=f"rope.forward/{case.name}",
        run=rope,
        arguments=arguments,
        bytes_moved=nbytes(jax.eval_shape(lambda: (arguments(), arguments()[:2]))),
        implementations=("xla",),
    )


def _arguments(case: RopeCase) -> tuple[Any, ...]:
    """Returns random q and k, and the tables."""
    keys = jax.random.split(jax.random.key(0))
    q, k = (
        jax.random.normal(
            key, (case.batch, case.tokens, heads, case.head_size), jnp.bfloat16
        )
        for key, heads in zip(keys, (case.heads, case.kv_heads), strict=True)
    )
    return q, k, *rotary_tables(case.positions(), case.inv_freq(), scale=case.scale)
