"""Gradient of RMSNorm on Hopper: one warpgroup a row, everything in one pass.

With g = dout * (offset + weight) and r = 1 / sqrt(mean(x²) + eps),

    dx = r g - x r³ mean(g x) + dtotal,    dweight = sum over rows of dout x r.

The two means do not wait for one another. Without dweight a block takes one row. With
it, as many blocks as run at a time take turns with the rows, add up in shared memory
(each thread its own features, so no barrier) and write a float32 partial sum; XLA adds
those. One more block than fits would wait for the others and double the time.

Bytes a token: 6 D, 8 D with dtotal (bf16). Budget at D 4096: 2 KiB shared memory, 18
with dweight; no pipeline; 80 registers a thread, 103 with dtotal, with dweight 126 and
156.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.device import multiprocessors

from . import rows

KERNEL_NAME = "rms_norm_dx"
WEIGHT_KERNEL_NAME = "rms_norm_dx_dweight"

_REGISTERS = 512  # of a processor for each thread of a block


def gradients(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    dout: Float[Array, "*B D"],
    dtotal: Float[Array, "*B D"] | None,
    *,
    eps: float,
    offset: float,
    wants_dweight: bool,
) -> tuple[Float[Array, "*B D"], Float32[Array, " D"] | None]:
    """Returns (dx + dtotal) in the dtype of `x`, and dweight if wanted."""
    inputs = [x, dout] if dtotal is None else [x, dout, dtotal]
    flat = [array.reshape(-1, x.shape[-1]) for array in inputs]
    if wants_dweight:
        dx, dweight = _with_dweight(
            weight, flat, eps=eps, offset=offset, processors=multiprocessors()
        )
    else:
        dx, dweight = _without_dweight(weight, flat, eps=eps, offset=offset), None
    return dx.reshape(x.shape), dweight


@functools.partial(jax.jit, static_argnames=("eps", "offset"))
def _without_dweight(
    weight: Array, flat: list[Array], *, eps: float, offset: float
) -> Array:
    """Returns dx; compiled, so that equal calls in a program are lowered once."""

    def body(weight_gmem, *arrays_gmem):
        row = lax.axis_index("row")
        _one_row(row, weight_gmem, arrays_gmem, eps=eps, offset=offset)

    x = flat[0]
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0],),
        grid_names=("row",),
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(),
    )(weight, *flat)


@functools.partial(jax.jit, static_argnames=("eps", "offset", "processors"))
def _with_dweight(
    weight: Array, flat: list[Array], *, eps: float, offset: float, processors: int
) -> tuple[Array, Array]:
    """Returns dx and dweight; compiled likewise."""
    x = flat[0]
    count, features = x.shape
    blocks = min(count, processors * _blocks_of_processor(features, len(flat)))

    def body(weight_gmem, *refs):
        *arrays_gmem, partial_gmem, sum_smem = refs
        block = lax.axis_index("block")

        def add_row(i, _):
            row = block + i * blocks
            term = _one_row(row, weight_gmem, arrays_gmem, eps=eps, offset=offset)
            sum_smem[...] = rows.load(sum_smem) + term

        zeros = jnp.zeros((features,), jnp.float32)
        sum_smem[...] = plgpu.layout_cast(zeros, rows.layout(features))
        rows_of_block = lax.div(count - block + (blocks - 1), jnp.int32(blocks))
        lax.fori_loop(0, rows_of_block, add_row, None)
        partial_gmem[block] = rows.load(sum_smem)

    dx, partial_sums = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((blocks, features), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((features,), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=WEIGHT_KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(),
    )(weight, *flat)
    return dx, partial_sums.sum(axis=0)


def _blocks_of_processor(features: int, inputs: int) -> int:
    """Returns how many blocks with dweight the registers of a processor hold.

    The compiler takes about 30 registers, 3 for each feature of a thread and half a
    one more with dtotal.
    """
    registers = 30 + (3.5 if inputs == 3 else 3) * (features / 128)
    return min(8, int(_REGISTERS / registers))


def _one_row(row, weight_gmem, arrays_gmem, *, eps: float, offset: float):
    """Writes dx of a row and returns its term of dweight."""
    *inputs_gmem, dx_gmem = arrays_gmem
    x, dout, *dtotal = (rows.load(array.at[row]) for array in inputs_gmem)
    g = dout * rows.gain(weight_gmem, offset)
    mean_square, mean_gx = jnp.sum(x * x) / x.size, jnp.sum(g * x) / x.size
    rstd = lax.rsqrt(mean_square + eps)
    dx = rstd * g - x * (rstd * rstd * rstd * mean_gx)
    if dtotal:
        dx += dtotal[0]
    dx_gmem[row] = dx.astype(dx_gmem.dtype)
    return dout * x * rstd
