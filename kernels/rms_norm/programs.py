"""RMSNorm at real shapes, for the compile check and the benchmark."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.program import Program

from . import mosaic_gpu, mosaic_gpu_vjp, vjp
from .api import add_rms_norm, rms_norm
from .cases import GPU_CASES, RMSNormCase

_PASSES = {"mosaic_gpu": vjp.MOSAIC_GPU, "xla": vjp.XLA}


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return tuple(
        program
        for case in GPU_CASES
        for program in (_norm(case), _add_norm(case), *_backwards(case))
    )


def _norm(case: RMSNormCase) -> Program:
    kernels = (mosaic_gpu.KERNEL_NAME,)
    return _program(case, "forward", kernels, _forward, rows=2, op="rms_norm")


def _add_norm(case: RMSNormCase) -> Program:
    kernels = (mosaic_gpu.ADD_KERNEL_NAME,)
    op = "add_rms_norm"
    return _program(case, "add", kernels, _add_forward, inputs=2, rows=4, op=op)


def _backwards(case: RMSNormCase) -> tuple[Program, ...]:
    dx, dweight = mosaic_gpu_vjp.KERNEL_NAME, mosaic_gpu_vjp.WEIGHT_KERNEL_NAME
    return (
        _program(case, "dx", (dx,), _dx, inputs=2, rows=3, op="rms_norm"),
        _program(case, "dx_residual", (dx,), _dx, inputs=3, rows=4, op="add_rms_norm"),
        _program(case, "dx_dweight", (dweight,), _dx_dweight, inputs=2, rows=3),
        _program(case, "dx_both", (dweight,), _dx_dweight, inputs=3, rows=4),
    )


def _program(
    case: RMSNormCase,
    what: str,
    kernels: tuple[str, ...],
    run: Any,
    *,
    rows: int,
    inputs: int = 1,
    op: str | None = None,
) -> Program:
    """Builds a program of `inputs` arrays like x, which moves `rows` such arrays.

    With an `op` its time counts for that op's default: those of frozen weights do.
    """
    arguments = functools.partial(_arguments, case, inputs)
    x, *_ = jax.eval_shape(arguments)
    return Program(
        name=f"rms_norm.{what}/{case.name}",
        kernels=kernels,
        run=functools.partial(run, case),
        arguments=arguments,
        bytes_moved=rows * x.size * x.dtype.itemsize,
        decides=None if op is None else (op, {"features": case.features}),
    )


def _arguments(case: RMSNormCase, inputs: int) -> tuple[jax.Array, ...]:
    """Returns `inputs` random arrays like x, then the weight."""
    keys = jax.random.split(jax.random.key(0), inputs)
    shape = (*case.leading, case.features)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    weight = jnp.full((case.features,), 1 - case.offset, jnp.bfloat16)
    return (*arrays, weight)


def _forward(case: RMSNormCase, x: Any, weight: Any, *, implementation: str) -> Any:
    options = {"eps": case.eps, "offset": case.offset}
    return rms_norm(x, weight, **options, implementation=implementation)


def _add_forward(
    case: RMSNormCase, x: Any, residual: Any, weight: Any, *, implementation: str
) -> Any:
    options = {"eps": case.eps, "offset": case.offset}
    return add_rms_norm(x, residual, weight, **options, implementation=implementation)


def _dx(
    case: RMSNormCase,
    x: Any,
    dout: Any,
    *rest: Any,
    implementation: str,
    wants_dweight: bool = False,
) -> Any:
    """Runs the backward alone: differentiating would run a forward as well."""
    *dtotal, weight = rest
    return _PASSES[implementation].gradients(
        x,
        weight,
        dout,
        dtotal[0] if dtotal else None,
        eps=case.eps,
        offset=case.offset,
        wants_dweight=wants_dweight,
    )


_dx_dweight = functools.partial(_dx, wants_dweight=True)
