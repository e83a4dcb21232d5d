"""RMSNorm against NumPy, and every implementation against the reference."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.device import compute_capability
from kernels.numerics import relative_error, tolerance
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm.cases import CASES, GPU_CASES, RMSNormCase

DTYPES = (jnp.float32, jnp.bfloat16)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def norm_and_gradients(case: RMSNormCase, arrays, implementation):
    def objective(x, weight):
        out = rms_norm(
            x,
            weight,
            eps=case.eps,
            offset=case.offset,
            implementation=implementation,
        )
        return weighted_sum(out), out

    x, _, weight = arrays
    (_, out), gradients = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(x, weight)
    return out, *gradients


def add_norm_and_gradients(case: RMSNormCase, arrays, implementation):
    def objective(x, residual, weight):
        out = add_rms_norm(
            x,
            residual,
            weight,
            eps=case.eps,
            offset=case.offset,
            implementation=implementation,
        )
        return weighted_sum(out[0]) + weighted_sum(jnp.sin(out[1])), out

    (_, out), gradients = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
    )(*arrays)
    return *out, *gradients


def weighted_sum(x):
    weights = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    weights = jnp.asarray(weights).astype(x.dtype).astype(jnp.float32)
    return jnp.sum(x.astype(jnp.float32) * weights)


def check(function, case, dtype):
    arrays = case.arrays(dtype)
    actual = function(case, arrays, "xla")
    floats = tuple(x.astype(jnp.float32) for x in arrays)
    expected = function(case, floats, "reference")
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < tolerance(dtype, terms=2)


@named(CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [norm_and_gradients, add_norm_and_gradients])
def test_matches_the_float32_reference(function, case, dtype):
    check(function, case, dtype)


@pytest.mark.gpu
@named(GPU_CASES)
@pytest.mark.parametrize("function", [norm_and_gradients, add_norm_and_gradients])
def test_matches_at_real_shapes(function, case):
    if compute_capability() is None:
        pytest.skip("needs a CUDA GPU")
    check(function, case, jnp.bfloat16)


@named(CASES)
def test_the_reference_matches_numpy(case):
    x, _, weight = (np.asarray(a, np.float64) for a in case.arrays(jnp.float32))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + case.eps)
    expected = expected * (case.offset + weight)
    x, _, weight = case.arrays(jnp.float32)
    actual = rms_norm(
        x, weight, eps=case.eps, offset=case.offset, implementation="reference"
    )
    assert relative_error(actual, expected) < tolerance(jnp.float32)


def test_add_rms_norm_equals_an_addition_and_a_norm():
    x, residual, weight = CASES[2].arrays(jnp.bfloat16)
    norm, total = add_rms_norm(x, residual, weight, eps=1e-5)
    assert jnp.array_equal(total, x + residual)
    assert jnp.array_equal(norm, rms_norm(total, weight, eps=1e-5))


def test_the_weight_gradient_is_summed_in_float32():
    tokens = 3000
    x = jnp.ones((tokens, 4), jnp.bfloat16)
    weight = jnp.ones((4,), jnp.bfloat16)
    gradient = jax.grad(
        lambda w: rms_norm(x, w, eps=0.0).astype(jnp.float32).sum(), argnums=0
    )(weight)
    assert gradient.dtype == jnp.bfloat16
    assert relative_error(gradient, np.full(4, float(tokens))) < 4e-3


def test_the_weight_may_have_its_own_dtype():
    x, _, weight = CASES[1].arrays(jnp.float32)

    def objective(x, w):
        return rms_norm(x, w, eps=1e-6).astype(jnp.float32).sum()

    dx, dweight = jax.grad(objective, argnums=(0, 1))(x.astype(jnp.bfloat16), weight)
    assert (dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.float32)


def test_only_the_input_and_the_weight_are_saved():
    x, _, weight = CASES[2].arrays(jnp.bfloat16)
    _, pullback = jax.vjp(lambda x, w: rms_norm(x, w, eps=1e-6), x, weight)
    saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > 1]
    assert sorted(leaf.size for leaf in saved) == sorted([x.size, weight.size])


def test_a_wrong_weight_is_refused():
    unchecked = inspect.unwrap(rms_norm)  # as users run it, without jaxtyping
    with pytest.raises(ValueError, match="last axis"):
        unchecked(jnp.ones((2, 4)), jnp.ones((3,)), eps=1e-6)


def test_mixed_dtypes_are_refused():
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="alike"):
        add_rms_norm(x, x.astype(jnp.bfloat16), jnp.ones((4,)), eps=1e-6)
