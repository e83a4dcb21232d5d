"""The cross-entropy at real shapes, for the compile check and the benchmark."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from .api import choice_case, linear_cross_entropy
from .cases import TIMED, Case
from .mosaic_gpu import KERNEL_NAME


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return tuple(map(_program, TIMED))


def _program(case: Case) -> Program:
    """Loss and gradient of the hidden states: two products with the head."""
    arguments = functools.partial(_arguments, case)
    run = functools.partial(_loss_and_gradient, case)
    hidden, head, targets = jax.eval_shape(arguments)
    return Program(
        name=f"cross_entropy.loss_and_gradient/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=nbytes((hidden, head, targets, hidden)) + 8,
        flops=4 * case.rows * case.features * case.vocabulary,
        kernels=(KERNEL_NAME,),
        decides=("cross_entropy", choice_case(hidden, head)),
    )


def _arguments(case: Case) -> tuple[jax.Array, ...]:
    """Returns random hidden states, head and targets; logits have variance one."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (case.rows, case.features), jnp.bfloat16)
    head = jax.random.normal(keys[1], (case.vocabulary, case.features), jnp.bfloat16)
    targets = jax.random.randint(keys[2], (case.rows,), 0, case.vocabulary)
    return hidden, head * case.features**-0.5, targets


def _loss_and_gradient(
    case: Case,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    implementation: str,
) -> Any:
    def loss_and_count(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return linear_cross_entropy(
            hidden,
            head,
            targets,
            softcap=case.softcap,
            chunk_tokens=case.chunk_tokens,
            implementation=implementation,
        )

    return jax.value_and_grad(loss_and_count, has_aux=True)(hidden)
