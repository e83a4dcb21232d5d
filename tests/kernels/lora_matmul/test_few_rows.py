"""What the product of few rows does to codes and scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.interpret import interpreted
from kernels.lora_matmul.few_rows import few_rows_product
from kernels.lora_matmul.few_rows_registers import value_words
from kernels.nf4 import CODEBOOKS, dequantize, quantize
from kernels.numerics import relative_error


@pytest.mark.parametrize(
    ("code", "dtype", "moved"),
    [("nf4", "bfloat16", 7e-4), ("nf4", "float16", 7e-5), ("fp4", "bfloat16", 1e-7)],
)
def test_both_values_of_a_byte_are_near_its_codes(code, dtype, moved):
    words, factor = value_words(code, dtype)
    pairs = words[:, None].view(jnp.dtype(dtype)).astype(np.float64) / factor
    octets = np.arange(256)
    expected = CODEBOOKS[code][np.stack([octets >> 4, octets & 15], axis=-1)]
    assert relative_error(pairs, expected) < moved


def test_weights_are_rounded_less_than_to_16_bits_and_a_scale_may_be_zero():
    keys = jax.random.split(jax.random.key(0))
    weight = quantize(jax.random.normal(keys[0], (768, 256), jnp.bfloat16) / 8)
    # The scales of the first 256 blocks are zero, their codes are not.
    nested = weight.nested_absmax.at[0].set(0)
    offset = jnp.zeros_like(weight.nested_offset)
    weight = dataclasses.replace(weight, nested_absmax=nested, nested_offset=offset)
    x = jax.random.normal(keys[1], (3, 768), jnp.bfloat16)
    with interpreted():
        actual = few_rows_product(x, weight, blocks=1)
    exact = dequantize(dataclasses.replace(weight, dtype="float32"))
    expected = np.asarray(x, np.float64) @ np.asarray(exact, np.float64)
    rounded = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64)
    assert relative_error(actual, expected) < relative_error(rounded, expected)
    assert np.abs(np.where(expected == 0, actual, 0)).max() < 1e-15
    assert (expected[:, :21] == 0).all()
