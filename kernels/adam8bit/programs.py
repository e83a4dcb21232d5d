"""Adam with 8-bit states at real sizes, for the compile check and the benchmark."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from . import mosaic_gpu
from .api import adam8bit
from .blocks import Blocks, in_blocks
from .cases import LARGE, Case
from .ranks import MU_RANKS, NU_RANKS
from .xla import encode

_BETAS = {"b1": 0.9, "b2": 0.999}


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return tuple(map(_program, LARGE))


def _program(case: Case) -> Program:
    arguments = functools.partial(_arguments, case)
    gradient, mu, nu, _ = jax.eval_shape(arguments)
    return Program(
        name=f"adam8bit/{case.name}",
        kernels=(mosaic_gpu.KERNEL_NAME,),
        run=_run,
        arguments=arguments,
        bytes_moved=2 * nbytes((gradient, mu, nu)),
        decides=("adam8bit", {"elements": gradient.size}),
    )


def _arguments(case: Case) -> tuple[Any, ...]:
    """Returns a random gradient and moments of random gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    gradient, mu, nu = (jax.random.normal(key, case.shape) for key in keys)
    return (
        gradient,
        encode(in_blocks(mu), MU_RANKS),
        encode(in_blocks(jnp.square(nu)), NU_RANKS),
        jnp.int32(4),
    )


def _run(
    gradient: Any, mu: Blocks, nu: Blocks, step: Any, *, implementation: str
) -> Any:
    return adam8bit(
        gradient, mu, nu, step, **_BETAS, eps=1e-8, implementation=implementation
    )
