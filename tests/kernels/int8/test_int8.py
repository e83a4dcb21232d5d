"""8-bit matrices: the numbers of LLM.int8, and products with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.int8 import STEP, Int8Array, dequantize, quantize
from kernels.lora_matmul import lora_matmul

pytestmark = pytest.mark.usefixtures("optimised")

WEIGHT = jax.random.normal(jax.random.key(0), (24, 40), jnp.float32)


def test_a_column_is_codes_times_its_largest_magnitude() -> None:
    weight = WEIGHT.at[:, 3].set(0).at[5, 4].set(1e-40)
    packed = quantize(weight)
    largest = np.abs(weight).max(axis=0)
    np.testing.assert_array_equal(packed.absmax, largest)
    assert packed.codes.dtype == jnp.int8
    assert packed.shape == (24, 40)
    # Divisors that are no zeros; the column of zeros has codes of zero.
    shares = np.asarray(weight) / np.where(largest > 0, largest, 1)
    np.testing.assert_array_equal(packed.codes, np.rint(127 * shares))
    actual = np.asarray(dequantize(packed))
    np.testing.assert_array_equal(actual, np.asarray(packed.codes) * largest * STEP)
    assert np.all(np.abs(actual - weight) <= 0.501 * largest / 127)


def test_packing_again_changes_nothing() -> None:
    packed = quantize(WEIGHT.astype(jnp.bfloat16))
    again = quantize(dequantize(packed))
    np.testing.assert_array_equal(again.codes, packed.codes)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_products_and_gradients_are_those_of_the_dense_matrix(
    implementation: str,
) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (7, 24), jnp.float32)
    a = jax.random.normal(keys[1], (24, 4), jnp.float32)
    b = jax.random.normal(keys[2], (4, 40), jnp.float32)

    def total(x: jax.Array, a: jax.Array, b: jax.Array, w: object) -> jax.Array:
        y = lora_matmul(x, w, a, b, scaling=0.5, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    packed = quantize(WEIGHT)
    results = [
        jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(x, a, b, w)
        for w in (packed, dequantize(packed))
    ]
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_stacks_unpack_at_once() -> None:
    parts = [quantize(WEIGHT), quantize(2 * WEIGHT)]
    stack: Int8Array = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    np.testing.assert_array_equal(dequantize(stack)[1], dequantize(parts[1]))
