"""Quantises a matrix to 4 bits with the numbers of bitsandbytes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from kernels.line import as_lines

from . import rounding
from .array import NF4Array
from .codebooks import CODEBOOKS, DYNAMIC_MAP, Code

_NESTED_BLOCK_SIZE = 256
_TINY = np.finfo(np.float32).tiny


def quantize(
    w: Float[Array, "I O"],
    *,
    code: Code = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
) -> NF4Array:
    """Returns `w` in 4 bits, bit-equal with bitsandbytes on the same weights.

    Works under jit; there, `quantize(hf_weight.T)` of an [out, in] tensor moves no
    data. Arithmetic is float32. A block that holds NaN or infinity dequantises to NaN.

    Args:
      w: Any float dtype, which dequantised values have again.
      code: "nf4" (normal quantiles) or "fp4" (floating point of 4 bits).
      double_quant: Keeps the scales as 8-bit codes, 0.127 bits an element instead of
        0.5 (arxiv.org/abs/2305.14314, section 3).
      block_size: Elements that share a scale.

    Raises:
      ValueError: The codebook has no such name or `block_size` is odd.
    """
    if code not in CODEBOOKS:
        raise ValueError(f"{code=} must be one of {', '.join(CODEBOOKS)}")
    if block_size <= 0 or block_size % 2:
        raise ValueError(f"{block_size=} must be positive and even")
    inputs, outputs = w.shape
    codes, absmax = _nearest(w.T.reshape(-1), CODEBOOKS[code], block_size)
    codes = jnp.pad(codes, (0, codes.size % 2), constant_values=_zero_code(code))
    nested_absmax = nested_offset = None
    if double_quant:
        offset = rounding.mean(absmax)
        nested_offset = as_lines(offset)
        absmax, nested_absmax = _nearest(
            absmax - offset, DYNAMIC_MAP, _NESTED_BLOCK_SIZE
        )
    return NF4Array(
        codes=codes[0::2] << 4 | codes[1::2],
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        shape=(inputs, outputs),
        dtype=w.dtype.name,
        code=code,
        block_size=block_size,
        nested_block_size=_NESTED_BLOCK_SIZE,
    )


def _nearest(
    flat: Float[Array, " M"], codebook: np.ndarray, block_size: int
) -> tuple[UInt8[Array, " M"], Float32[Array, " blocks"]]:
    """Returns the code nearest to each element over its block's maximum, and those.

    Half way between two values the lower one is taken.
    """
    size = flat.size
    blocks = jnp.pad(flat.astype(jnp.float32), (0, -size % block_size))
    blocks = blocks.reshape(-1, block_size)
    absmax = jnp.abs(blocks).max(axis=1)
    # A block of zeros keeps its zeros; the clip takes back what the reciprocal adds.
    scale = rounding.quotient(jnp.ones_like(absmax), jnp.maximum(absmax, _TINY))
    scaled = jnp.clip(blocks * scale[:, None], -1, 1).reshape(-1)[:size]
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return jnp.asarray(order.astype(np.uint8))[_rank(scaled, midpoints)], absmax


def _rank(x: Float32[Array, " M"], midpoints: np.ndarray) -> UInt8[Array, " M"]:
    """Returns how many midpoints lie below each element."""
    if midpoints.size > 16:
        return _rank_among_many(x, midpoints)
    # So few comparisons fuse into one pass, faster than a search.
    rank = jnp.zeros(x.shape, jnp.uint8)
    for midpoint in midpoints:
        rank += (x > midpoint).astype(jnp.uint8)
    return rank


def _rank_among_many(
    x: Float32[Array, " M"], midpoints: np.ndarray
) -> UInt8[Array, " M"]:
    """Does as `_rank` by halving what is left.

    The first comparison is with one number: XLA would look it up for every element
    while it compiles, a second for a million (as for `jnp.searchsorted`).
    """
    half = 1 << (midpoints.size.bit_length() - 1)
    padded = np.full(2 * half - 1, np.inf, np.float32)
    padded[: midpoints.size] = midpoints
    rank = (x > padded[half - 1]).astype(jnp.int32) * half
    while half > 1:
        half //= 2
        is_above = x > jnp.asarray(padded)[rank + (half - 1)]
        rank += is_above.astype(jnp.int32) * half
    return rank.astype(jnp.uint8)


def _zero_code(code: Code) -> int:
    return int(np.flatnonzero(CODEBOOKS[code] == 0)[0])
