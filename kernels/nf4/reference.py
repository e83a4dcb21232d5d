"""Dequantisation as the format defines it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from . import rounding
from .array import NF4Array
from .codebooks import CODEBOOKS, DYNAMIC_MAP


def dequantize(w: NF4Array) -> Float[Array, "*L I O"]:
    """Returns `codebook[code] * absmax` of each element, rounded to `w.dtype`."""
    nibbles = jnp.stack([w.codes >> 4, w.codes & 15], axis=-1)
    lead = w.codes.shape[:-1]
    values = jnp.asarray(CODEBOOKS[w.code])[nibbles].reshape(*lead, -1)[..., : w.size]
    scales = jnp.repeat(block_scales(w), w.block_size, axis=-1)[..., : w.size]
    return matrix(values * scales, w)


def block_scales(w: NF4Array) -> Float32[Array, "*L blocks"]:
    """Returns the scale of each block in float32."""
    if w.nested_absmax is None or w.nested_offset is None:
        return w.absmax
    blocks = w.absmax.shape[-1]
    nested = jnp.repeat(w.nested_absmax, w.nested_block_size, axis=-1)[..., :blocks]
    # bitsandbytes rounds the product before it adds; a fused multiply-add would not.
    return (
        rounding.product(jnp.asarray(DYNAMIC_MAP)[w.absmax], nested)
        + w.nested_offset[..., :1]
    )


def matrix(
    values: Float32[Array, "*L elements"], w: NF4Array
) -> Float[Array, "*L I O"]:
    """Returns flat values of Hugging Face's order as matrices of `w.dtype`."""
    rows = values.astype(w.dtype).reshape(*values.shape[:-1], *w.shape[::-1])
    return rows.swapaxes(-1, -2)
