"""Attention at real shapes, for the compile check, the benchmark and the tuner."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from . import mosaic_gpu, mosaic_gpu_dq, mosaic_gpu_dscores, mosaic_gpu_vjp
from .api import attention, attention_visits, choice_case
from .cases import LARGE_CASES, AttentionCase
from .flash import dscores_bytes


def programs() -> tuple[Program, ...]:
    """Returns every program of the op.

    Whole rows are computed without keeping gradients of scores too, where they could.
    """
    found = []
    for case in LARGE_CASES:
        found += [_program(case, "forward"), _program(case, "both")]
        is_whole = not (case.documents or case.window or case.softcap)
        if is_whole and _keeps(case):
            found.append(_program(case, "lean"))
    return tuple(found)


def _keeps(case: AttentionCase) -> bool:
    q = jax.ShapeDtypeStruct(case.q_shape, jnp.bfloat16)
    return dscores_bytes(q, softcap=case.softcap) > 0


def _program(case: AttentionCase, what: str) -> Program:
    """Builds the forward pass, both passes, or both without keeping gradients."""
    has_dout = what != "forward"
    keeps_dscores = _keeps(case) and what == "both"
    arguments = functools.partial(_arguments, case, has_dout=has_dout)
    run = functools.partial(_forward, case)
    if has_dout:
        run = functools.partial(_both, case, keeps_dscores)
    shapes = jax.eval_shape(arguments)
    decided = choice_case(
        case.head_size,
        case.tokens,
        is_packed=bool(case.documents),
        has_window=case.window is not None,
        has_softcap=case.softcap is not None,
        keeps_dscores=keeps_dscores,
    )
    dq = mosaic_gpu_dscores if keeps_dscores else mosaic_gpu_dq
    backward = (dq.KERNEL_NAME, mosaic_gpu_vjp.KERNEL_NAME)
    # Scores' worth of pairs.
    products = 7 if has_dout else 2
    return Program(
        name=f"attention.{what}/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=nbytes((shapes, shapes[2:] if has_dout else shapes[2])),
        flops=products * 2 * case.heads * case.head_size * case.visible_pairs(),
        kernels=(mosaic_gpu.KERNEL_NAME, *(backward if has_dout else ())),
        implementations=("mosaic_gpu", "mosaic_gpu_cudnn", "cudnn", "xla"),
        # Training decides.
        decides=("attention", decided) if has_dout else None,
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
    keeps_dscores: bool = True,
) -> Any:
    options = case.options() | {"segment_ids": segment_ids, "visits": visits}
    options |= {"keeps_dscores": keeps_dscores, "implementation": implementation}
    return attention(*arrays, **options)


def _both(
    case: AttentionCase,
    keeps_dscores: bool,
    segment_ids: Any,
    visits: Any,
    *arrays_and_dout: Any,
    implementation: str,
) -> Any:
    """Returns the output and the three gradients."""
    *arrays, dout = arrays_and_dout
    run = functools.partial(
        _forward,
        case,
        segment_ids,
        visits,
        implementation=implementation,
        keeps_dscores=keeps_dscores,
    )
    out, pullback = jax.vjp(run, *arrays)
    return out, *pullback(dout)
