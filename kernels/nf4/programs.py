"""Dequantisation at real shapes, for the compile check and the benchmark."""

import functools

import jax
import jax.numpy as jnp

from kernels.program import Program, nbytes

from . import mosaic_gpu
from .api import dequantize
from .array import NF4Array
from .cases import LARGE, Case
from .quantize import quantize


def _weights(case: Case, *, double_quant: bool) -> tuple[NF4Array]:
    shape = (case.inputs, case.outputs)
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    return (quantize(w, double_quant=double_quant),)


def _rows(w: NF4Array, *, implementation: str) -> jax.Array:
    """Returns the matrix in the order of the codes, as products take it.

    As a result of its own, (I, O) would be transposed in memory.
    """
    return dequantize(w, implementation=implementation).T


def _program(case: Case, *, double_quant: bool = True) -> Program:
    arguments = functools.partial(_weights, case, double_quant=double_quant)
    moved = nbytes(jax.eval_shape(lambda: (arguments(), dequantize(*arguments()))))
    scales = "" if double_quant else "_float32_scales"
    return Program(
        name=f"nf4.dequantize/{case.name}{scales}",
        kernels=(mosaic_gpu.KERNEL_NAME,),
        run=_rows,
        arguments=arguments,
        bytes_moved=moved,
        decides=("nf4", {"elements": case.inputs * case.outputs}),
    )


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    return (*map(_program, LARGE), _program(LARGE[0], double_quant=False))
