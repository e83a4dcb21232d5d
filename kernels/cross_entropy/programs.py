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
    """Returns every program of the op.

    "two_products" are those with the head alone, without a loss, as cuBLAS runs them.
    """
    return tuple(program for case in TIMED for program in _programs(case))


def _programs(case: Case) -> tuple[Program, Program]:
    """Loss and gradient of the hidden states: two products with the head."""
    arguments = functools.partial(_arguments, case)
    run = functools.partial(_loss_and_gradient, case)
    hidden, head, targets = jax.eval_shape(arguments)
    products = Program(
        name=f"cross_entropy.two_products/{case.name}",
        run=functools.partial(_two_products, case),
        arguments=lambda: arguments()[:2],
        bytes_moved=nbytes((hidden, head, hidden)),
        flops=4 * case.rows * case.features * case.vocabulary,
        implementations=("xla",),
    )
    loss = Program(
        name=f"cross_entropy.loss_and_gradient/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=nbytes((hidden, head, targets, hidden)) + 8,
        flops=4 * case.rows * case.features * case.vocabulary,
        kernels=(KERNEL_NAME,),
        decides=("cross_entropy", choice_case(hidden, head)),
        rival=products,
    )
    return loss, products


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


def _two_products(
    case: Case, hidden: jax.Array, head: jax.Array, *, implementation: str
) -> jax.Array:
    """Returns `(hidden @ head^T) @ head`, in the op's chunks of rows."""
    del implementation  # there is one
    chunks = hidden.reshape(-1, case.chunk_tokens, case.features)
    product = jax.lax.map(lambda rows: jnp.dot(jnp.dot(rows, head.T), head), chunks)
    return product.reshape(hidden.shape)
