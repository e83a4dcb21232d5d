"""How results are compared: error measures, and tolerances per dtype."""

import jax
import numpy as np

_TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


def relative_error(
    actual: jax.typing.ArrayLike, expected: jax.typing.ArrayLike
) -> float:
    """Returns `|actual - expected| / |expected|` in the Frobenius norm, in float64."""
    expected64 = np.asarray(expected).astype(np.float64)
    difference = np.asarray(actual).astype(np.float64) - expected64
    norm = np.linalg.norm(expected64.ravel())
    error = np.linalg.norm(difference.ravel())
    return float(error / norm) if norm > 0 else float(error)


def tolerance(dtype: jax.typing.DTypeLike, *, terms: int = 1) -> float:
    """Returns the relative error that rounding in `dtype` may cause.

    Args:
      dtype: Of the inputs; sums are taken to be float32 or better.
      terms: Roundings in a row, for example the matrix products of a chain.
    """
    return _TOLERANCES[np.dtype(dtype).name] * max(1.0, terms) ** 0.5
