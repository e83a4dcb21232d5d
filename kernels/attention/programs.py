"""Attention at real shapes, for the compile check, the benchmark and the tuner."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from . import mosaic_gpu, mosaic_gpu_dscores, mosaic_gpu_vjp
from .api import attention, attention_visits, choice_case, dscores_bytes
from .cases import LARGE_CASES, AttentionCase


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return tuple(
        program
        for case in LARGE_CASES
        for program in (
            _program(case, "forward", _forward, products=2),
            _program(case, "both", _both, products=7),
        )
    )


def _program(
    case: AttentionCase,
    what: str,
    run: Any,
    *,
    products: int,
) -> Program:
    """Builds a program that multiplies scores' worth of pairs `products` times."""
    arguments = functools.partial(_arguments, case, has_dout=what == "both")
    run = functools.partial(run, case)
    shapes = jax.eval_shape(arguments)
    results = shapes[2:] if what == "both" else shapes[2]
    decided = choice_case(
        case.head_size,
        case.tokens,
        is_packed=bool(case.documents),
        has_window=case.window is not None,
        has_softcap=case.softcap is not None,
    )
    kernels = ()
    if what == "both":
        q = jax.ShapeDtypeStruct(case.q_shape, jnp.bfloat16)
        dq = mosaic_gpu_vjp.DQ_KERNEL_NAME
        if dscores_bytes(q, softcap=case.softcap):
            dq = mosaic_gpu_dscores.KERNEL_NAME
        kernels = (dq, mosaic_gpu_vjp.DKV_KERNEL_NAME)
    return Program(
        name=f"attention.{what}/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=nbytes((shapes, results)),
        flops=products * 2 * case.heads * case.head_size * case.visible_pairs(),
        kernels=(mosaic_gpu.KERNEL_NAME, *kernels),
        implementations=("mosaic_gpu", "mosaic_gpu_cudnn", "cudnn", "xla"),
        # Training decides.
        decides=("attention", decided) if what == "both" else None,
    )


def _arguments(case: AttentionCase, *, has_dout: bool) -> tuple[Any, ...]:
    """Returns what layers share, q, k, v and, for the backward, the output's gradient.

    The documents and the visits are made once a step, outside of the layers.
    """
    shapes = [case.q_shape, case.k_shape, case.k_shape, case.q_shape]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    segment_ids = case.segment_ids()
    visits = attention_visits(
        arrays[0], segment_ids=segment_ids, window=case.window, softcap=case.softcap
    )
    return (segment_ids, visits, *arrays[: 4 if has_dout else 3])


def _forward(
    case: AttentionCase,
    segment_ids: Any,
    visits: Any,
    *arrays: Any,
    implementation: str,
) -> Any:
    options = case.options() | {"segment_ids": segment_ids, "visits": visits}
    return attention(*arrays, **options, implementation=implementation)


def _both(
    case: AttentionCase,
    segment_ids: Any,
    visits: Any,
    *arrays_and_dout: Any,
    implementation: str,
) -> Any:
    """Returns the output and the three gradients."""
    *arrays, dout = arrays_and_dout
    run = functools.partial(
        _forward, case, segment_ids, visits, implementation=implementation
    )
    out, pullback = jax.vjp(run, *arrays)
    return out, *pullback(dout)
