"""RMSNorm on Hopper, alone or with the residual add: one warpgroup a row.

A row is read once, stays in registers and is written once; the blocks of the grid, one
a row, overlap one another. Bytes a token: 4 D alone, 8 D with the add (bf16).
Budget at D 4096: 2 KiB shared memory (the row's sum), no barrier of its own, no
pipeline, 64 registers a thread.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from . import rows

KERNEL_NAME = "rms_norm"
ADD_KERNEL_NAME = "add_rms_norm"


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, offset: float
) -> Float[Array, "*B D"]:
    """Returns `x / sqrt(mean(x²) + eps) * (offset + weight)`."""
    return _launch(KERNEL_NAME, (x,), weight, eps, offset)[0]


def add_rms_norm(
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns the norm of `x + residual`, and that sum rounded to the dtype of `x`."""
    normed, total = _launch(ADD_KERNEL_NAME, (x, residual), weight, eps, offset)
    return normed, total


@functools.partial(jax.jit, static_argnames=("name", "eps", "offset"))
def _launch(
    name: str, terms: tuple[Array, ...], weight: Array, eps: float, offset: float
) -> list[Array]:
    """Runs the kernel; as many outputs as terms.

    Compiled, so that equal calls in a program are lowered once.
    """
    x = terms[0]
    flat = [term.reshape(-1, x.shape[-1]) for term in terms]
    like_x = jax.ShapeDtypeStruct(flat[0].shape, x.dtype)
    outputs = plgpu.kernel(
        functools.partial(_body, eps=eps, offset=offset),
        out_type=[like_x] * len(terms),
        grid=(len(flat[0]),),
        grid_names=("row",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(),
    )(weight, *flat)
    return [output.reshape(x.shape) for output in outputs]


def _body(weight_gmem, *arrays_gmem, eps: float, offset: float) -> None:
    terms_gmem = arrays_gmem[: len(arrays_gmem) // 2]
    normed_gmem, *total_gmem = arrays_gmem[len(terms_gmem) :]
    row = lax.axis_index("row")
    x, *residual = (rows.load(term.at[row]) for term in terms_gmem)
    if residual:
        rounded = (x + residual[0]).astype(normed_gmem.dtype)
        total_gmem[0][row] = rounded
        x = rounded.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.sum(x * x) / x.size + eps)
    normed = x * rstd * rows.gain(weight_gmem, offset)
    normed_gmem[row] = normed.astype(normed_gmem.dtype)
