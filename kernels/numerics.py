"""How results are compared: error measures, and tolerances per dtype."""

import jax
import jax.numpy as jnp
import numpy as np

_TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


def relative_error(
    actual: jax.typing.ArrayLike, expected: jax.typing.ArrayLike
) -> float:
    """Returns `|actual - expected| / |expected|` in the Frobenius norm.

    Computed in float64 on the host; in float32 on the accelerator if an array is there,
    since copies of large ones take longer than all else.
    """
    if any(_is_on_accelerator(array) for array in (actual, expected)):
        actual, expected = (jnp.asarray(a, jnp.float32) for a in (actual, expected))
        difference = actual - expected
        error, norm = (float(jnp.linalg.norm(a)) for a in (difference, expected))
    else:
        expected = np.asarray(expected).astype(np.float64)
        difference = np.asarray(actual).astype(np.float64) - expected
        error, norm = (float(np.linalg.norm(a)) for a in (difference, expected))
    return error / norm if norm > 0 else error


def _is_on_accelerator(array: jax.typing.ArrayLike) -> bool:
    return isinstance(array, jax.Array) and any(
        device.platform != "cpu" for device in array.devices()
    )


def tolerance(dtype: jax.typing.DTypeLike, *, terms: int = 1) -> float:
    """Returns the relative error that rounding in `dtype` may cause.

    Args:
      dtype: Of the inputs; sums are taken to be float32 or better.
      terms: Roundings in a row, for example the matrix products of a chain.
    """
    return _TOLERANCES[np.dtype(dtype).name] * max(1.0, terms) ** 0.5
