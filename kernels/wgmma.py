"""Where the kernels keep tiles: swizzled shared memory and wgmma accumulators."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzled(columns: int, dtype: jax.typing.DTypeLike) -> tuple[Any, ...]:
    """Returns the transforms of shared memory that wgmma reads without conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return (
        plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def accumulator(rows: int, columns: int) -> Any:
    """Returns a float32 accumulator, zero at first, for `pl.run_scoped`."""
    return plgpu.ACC((rows, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
