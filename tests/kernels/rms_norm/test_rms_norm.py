"""RMSNorm against NumPy, and every implementation against the reference."""

import collections
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp, record
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance
from kernels.rms_norm import add_rms_norm, mosaic_gpu_vjp, rms_norm
from kernels.rms_norm.cases import CASES, GPU_CASES, INTERPRETED_CASES, RMSNormCase

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
    weights = jax.random.normal(jax.random.key(9), x.shape).astype(x.dtype)
    return jnp.sum(x.astype(jnp.float32) * weights.astype(jnp.float32))


def check(function, case, dtype, implementation="xla"):
    arrays = case.arrays(dtype)
    actual = function(case, arrays, implementation)
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


@named(INTERPRETED_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [norm_and_gradients, add_norm_and_gradients])
def test_kernels_match_in_the_interpreter(function, case, dtype):
    with interpreted():
        actual = function(case, case.arrays(dtype), "mosaic_gpu")
    floats = tuple(x.astype(jnp.float32) for x in case.arrays(dtype))
    expected = function(case, floats, "reference")
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < tolerance(dtype, terms=2)


def test_blocks_that_take_several_rows_add_them_up(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_vjp, "multiprocessors", lambda: 2)
    monkeypatch.setattr(mosaic_gpu_vjp, "_blocks_of_processor", lambda *_: 1)
    case = RMSNormCase(name="", leading=(5,), features=256)
    with interpreted():
        actual = norm_and_gradients(case, case.arrays(jnp.float32), "mosaic_gpu")
    expected = norm_and_gradients(case, case.arrays(jnp.float32), "reference")
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < tolerance(jnp.float32, terms=2)


@pytest.mark.parametrize(
    ("features", "inputs", "expected"),
    [(896, 2, 8), (2048, 3, 5), (4096, 2, 4), (4096, 3, 3), (8192, 2, 2), (8192, 3, 2)],
)
def test_the_blocks_that_were_the_fastest_on_an_h200(features, inputs, expected):
    assert mosaic_gpu_vjp._blocks_of_processor(features, inputs) == expected


@pytest.mark.gpu
@named(GPU_CASES)
@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic_gpu", marks=pytest.mark.gpu(HOPPER))]
)
@pytest.mark.parametrize("function", [norm_and_gradients, add_norm_and_gradients])
def test_matches_at_real_shapes(function, implementation, case):
    check(function, case, jnp.bfloat16, implementation)


def launches(function, *arrays):
    """Returns how often each kernel stands in the program for a Hopper GPU."""
    with assume_compute_capability(HOPPER):
        traced = jax.jit(function).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return collections.Counter(re.findall(r"dump_basename\\00(\w+?)_\d+\\00", text))


@pytest.mark.parametrize("is_remat", [False, True])
@pytest.mark.parametrize("is_weight_trained", [False, True])
def test_kernels_launched(is_remat, is_weight_trained):
    x, residual, weight = INTERPRETED_CASES[2].arrays(jnp.bfloat16)

    def objective(x, residual, weight):
        norm, total = add_rms_norm(x, residual, weight, eps=1e-5)
        return weighted_sum(norm) + weighted_sum(total)

    function = jax.checkpoint(objective) if is_remat else objective
    trained = (0, 1, 2) if is_weight_trained else (0, 1)
    step = jax.value_and_grad(function, argnums=trained)
    actual = launches(step, x, residual, weight)
    backward = "rms_norm_dx_dweight" if is_weight_trained else "rms_norm_dx"
    assert actual == {"add_rms_norm": 1 + is_remat, backward: 1}


@pytest.mark.parametrize(
    ("features", "expected"),
    [(128, "xla"), (1000, "xla"), (1024, "mosaic_gpu"), (5120, "mosaic_gpu")],
)
def test_the_default_on_hopper(features, expected):
    x = jnp.ones((2, features), jnp.bfloat16)
    with assume_compute_capability(HOPPER), record() as chosen:
        jax.eval_shape(lambda x: rms_norm(x, x[0], eps=1e-6), x)
    assert chosen == {"rms_norm": {expected}}


def test_kernels_say_what_they_lack():
    def run(features):
        x = jnp.ones((2, features), jnp.bfloat16)
        return rms_norm(x, x[0], eps=1e-6, implementation="mosaic_gpu")

    with assume_compute_capability(HOPPER):
        with pytest.raises(UnsupportedOp, match="features=100 must be a multiple"):
            run(100)
        with pytest.raises(UnsupportedOp, match="at most 8192"):
            run(16384)
    with (
        assume_compute_capability((8, 0)),
        pytest.raises(UnsupportedOp, match=r"found compute \(8, 0\)"),
    ):
        run(1024)


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


def test_what_reads_the_input_as_well_joins_the_gradient_of_the_norm():
    x, _, weight = INTERPRETED_CASES[2].arrays(jnp.float32)

    def joined(x):
        norm, same = add_rms_norm(x, None, weight, eps=1e-5)
        return weighted_sum(norm) + weighted_sum(jnp.sin(same))

    def apart(x):
        norm = rms_norm(x, weight, eps=1e-5)
        return weighted_sum(norm) + weighted_sum(jnp.sin(x))

    actual, expected = jax.grad(joined)(x), jax.grad(apart)(x)
    assert relative_error(actual, expected) < tolerance(jnp.float32)
    counted = launches(jax.grad(joined), x.astype(jnp.bfloat16))
    assert counted == {"rms_norm_dx": 1}


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
