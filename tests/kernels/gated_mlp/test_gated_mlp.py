"""Gated activation against NumPy, and every implementation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dispatch import UnsupportedOp, record
from kernels.gated_mlp import gated_activation
from kernels.gated_mlp.cases import CASES, GPU_CASES, GatedCase
from kernels.numerics import relative_error, tolerance

DTYPES = (jnp.float32, jnp.bfloat16)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def product_and_gradients(case: GatedCase, gate, up, implementation):
    rng = np.random.default_rng(7)
    dout = jnp.asarray(rng.normal(size=case.shape).astype(np.float32))
    dout = dout.astype(jnp.bfloat16).astype(gate.dtype)

    @jax.jit
    def run(gate, up, dout):
        def op(gate, up):
            return gated_activation(
                gate, up, activation=case.activation, implementation=implementation
            )

        out, pullback = jax.vjp(op, gate, up)
        return out, *pullback(dout)

    return run(gate, up, dout)


def check(case, dtype):
    gate, up = case.arrays(dtype)
    actual = product_and_gradients(case, gate, up, "xla")
    floats = gate.astype(jnp.float32), up.astype(jnp.float32)
    expected = product_and_gradients(case, *floats, "reference")
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < tolerance(dtype)


@named(CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_float32_reference(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@named(GPU_CASES)
def test_matches_at_real_shapes(case):
    check(case, jnp.bfloat16)


@named(CASES)
def test_the_reference_matches_numpy(case):
    gate, up = (np.asarray(x, np.float64) for x in case.arrays(jnp.float32))
    if case.activation == "silu":
        active = gate / (1 + np.exp(-gate))
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        active = 0.5 * gate * (1 + np.tanh(inner))
    actual = gated_activation(
        *case.arrays(jnp.float32),
        activation=case.activation,
        implementation="reference",
    )
    assert relative_error(actual, active * up) < tolerance(jnp.float32)


def test_only_gate_and_up_are_saved():
    gate, up = CASES[1].arrays(jnp.bfloat16)
    _, pullback = jax.vjp(
        lambda gate, up: gated_activation(gate, up, activation="silu"), gate, up
    )
    saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > 1]
    assert [(leaf.size, leaf.dtype) for leaf in saved] == 2 * [(gate.size, gate.dtype)]


def test_large_gates_stay_finite():
    gate = jnp.array([-1e4, 1e4], jnp.float32)
    up = jnp.ones((2,), jnp.float32)
    gradient = jax.grad(
        lambda gate: gated_activation(gate, up, activation="silu").sum()
    )(gate)
    assert jnp.array_equal(gradient, jnp.array([0.0, 1.0]))


def test_an_unknown_activation_is_refused():
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="silu, gelu_pytorch_tanh"):
        gated_activation(x, x, activation="relu")


def test_mixed_dtypes_are_refused():
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="alike"):
        gated_activation(x, x.astype(jnp.bfloat16), activation="silu")


def test_kernels_of_the_network_are_refused_with_the_reason():
    x = jnp.ones((2, 2))
    with pytest.raises(UnsupportedOp, match="networks of frozen weights"):
        gated_activation(x, x, activation="silu", implementation="mosaic_gpu")
    with record() as chosen:
        gated_activation(x, x, activation="silu")
    assert chosen == {"gated_mlp": {"xla"}}
