"""Rotary embedding against complex numbers, and every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.numerics import relative_error, tolerance
from kernels.rope import rope, rotary_tables
from kernels.rope.cases import CASES, GPU_CASES, RopeCase

pytestmark = pytest.mark.usefixtures("optimised")

DTYPES = (jnp.float32, jnp.bfloat16)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def rotated_and_gradients(arrays, implementation):
    q, k, cos, sin = arrays
    rng = np.random.default_rng(7)
    cotangents = tuple(
        jnp.asarray(rng.normal(size=x.shape).astype(np.float32)).astype(jnp.bfloat16)
        for x in (q, k)
    )

    @jax.jit
    def run(q, k, cotangents):
        def op(q, k):
            return rope(q, k, cos, sin, implementation=implementation)

        out, pullback = jax.vjp(op, q, k)
        return *out, *pullback(cotangents)

    return run(q, k, tuple(c.astype(q.dtype) for c in cotangents))


def check(case: RopeCase, dtype):
    q, k, cos, sin = case.arrays(dtype)
    actual = rotated_and_gradients((q, k, cos, sin), "xla")
    floats = (q.astype(jnp.float32), k.astype(jnp.float32), cos, sin)
    expected = rotated_and_gradients(floats, "reference")
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
def test_the_reference_turns_complex_numbers(case):
    q, k, cos, sin = case.arrays(jnp.float32)
    positions = np.asarray(case.positions(), np.float64)
    angles = positions[:, :, None, None] * case.inv_freq().astype(np.float64)
    turn = case.scale * np.exp(1j * angles)
    for x, actual in zip(
        (q, k), rope(q, k, cos, sin, implementation="reference"), strict=True
    ):
        x1, x2 = np.split(np.asarray(x, np.float64), 2, axis=-1)
        turned = (x1 + 1j * x2) * turn
        expected = np.concatenate([turned.real, turned.imag], axis=-1)
        assert relative_error(actual, expected) < tolerance(jnp.float32)


def test_scores_depend_on_the_distance_only():
    inv_freq = CASES[1].inv_freq()
    q, k, *_ = CASES[1].arrays(jnp.float32)
    row = jnp.arange(q.shape[1], dtype=jnp.int32)
    scores = []
    for start in (0, 100):
        positions = jnp.broadcast_to(row + start, q.shape[:2])
        q_turned, k_turned = rope(q, k, *rotary_tables(positions, inv_freq))
        scores.append(jnp.einsum("BTH,BSH->BTS", q_turned[:, :, 0], k_turned[:, :, 0]))
    assert relative_error(scores[1], scores[0]) < 1e-5


def test_a_document_does_not_know_where_in_the_row_it_stands():
    case = CASES[2]
    q, k, cos, sin = case.arrays(jnp.float32)
    second = slice(case.document, 2 * case.document)
    packed, _ = rope(q, k, cos, sin)
    first_tables = cos[:, : case.document], sin[:, : case.document]
    alone, _ = rope(q[:, second], k[:, second], *first_tables)
    assert jnp.array_equal(packed[:, second], alone)


def test_only_the_tables_are_saved():
    q, k, cos, sin = CASES[1].arrays(jnp.bfloat16)
    _, pullback = jax.vjp(lambda q, k: rope(q, k, cos, sin), q, k)
    saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > 1]
    assert sum(leaf.size for leaf in saved) == cos.size + sin.size


def test_far_positions_keep_their_precision():
    inv_freq = np.array([1.0, 0.25], np.float32)
    positions = jnp.array([[131_071]], jnp.int32)
    cos, _ = rotary_tables(positions, inv_freq)
    expected = np.cos(131_071 * inv_freq.astype(np.float64))
    assert relative_error(cos[0, 0], expected) < 1e-5


def test_an_odd_head_size_is_refused():
    x, table = jnp.ones((1, 2, 1, 5)), jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="even head size"):
        rope(x, x, table, table)
