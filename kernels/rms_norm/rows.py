"""How the kernels of this folder spread a row of features over a warpgroup."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels.device import require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.registers import THREADS

MAX_FEATURES = 8192
"""A row stays in registers: 64 float32 numbers a thread and array."""

_DTYPES = ("bfloat16", "float16", "float32")


def check(x: Array, weight: Array) -> None:
    """Raises `UnsupportedOp` where the kernels cannot run."""
    require_hopper()
    features = weight.shape[0]
    if features % THREADS or features > MAX_FEATURES:
        raise UnsupportedOp(
            f"{features=} must be a multiple of {THREADS}, at most {MAX_FEATURES}"
        )
    for array in (x, weight):
        if array.dtype.name not in _DTYPES:
            raise UnsupportedOp(f"dtype {array.dtype} must be one of {_DTYPES}")
    if not 0 < x.size < 2**31:
        raise UnsupportedOp(f"{x.shape=} must hold fewer than 2**31 elements, and one")


def load(ref):
    """Returns a reference to one row as float32 in registers."""
    (features,) = ref.shape
    return plgpu.load(ref, layout=layout(features)).astype(jnp.float32)


def layout(features: int):
    """Returns the layout of a row: runs of at most eight features a thread."""
    run = next(n for n in (8, 4, 2, 1) if features % (n * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((features,), run)


def gain(weight_gmem, offset: float):
    """Returns `offset + weight`."""
    weight = load(weight_gmem)
    return weight + offset if offset else weight
