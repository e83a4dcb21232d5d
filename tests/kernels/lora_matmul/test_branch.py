"""The down projection of a branch, against automatic differentiation."""

import jax
import jax.numpy as jnp
import pytest

from kernels.lora_matmul import scaled_down_product
from kernels.lora_matmul.dropout import dropped, kept_scale
from kernels.numerics import relative_error, tolerance

SCALING, RATE = 1.5, 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_product_and_gradients(dtype: str, has_dropout: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (40, 24)).astype(dtype)
    a = jax.random.normal(keys[1], (24, 3))
    weights = jax.random.normal(keys[2], (40, 3)).astype(dtype).astype(jnp.float32)
    key = keys[3] if has_dropout else None

    def actual_sum(x: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        down = scaled_down_product(
            x, a, scaling=SCALING, dropout_rate=RATE, dropout_key=key
        )
        assert down.dtype == x.dtype
        return jnp.sum(weights * down.astype(jnp.float32)), down

    def expected_sum(x: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = SCALING * kept_scale(key, RATE)
        kept = dropped(x, key, RATE)
        down = scale * jnp.matmul(kept, a, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(weights * down), down

    (dx, da), down = jax.grad(actual_sum, (0, 1), has_aux=True)(x, a)
    expected = jax.grad(expected_sum, (0, 1), has_aux=True)(x.astype(jnp.float32), a)
    assert (dx.dtype, da.dtype) == (x.dtype, jnp.float32)
    for got, want in ((down, expected[1]), (dx, expected[0][0])):
        error = relative_error(got.astype(jnp.float32), want)
        assert error < tolerance(dtype, terms=3)
    # Nothing in it is rounded to 16 bits but the factors.
    assert relative_error(da, expected[0][1]) < 1e-6
