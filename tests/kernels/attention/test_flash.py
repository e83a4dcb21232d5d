"""The Hopper kernels: numbers in the interpreter and on a GPU, launches, refusals."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import (
    RESIDUAL_NAMES,
    attention,
    dscores_bytes,
    mosaic_gpu,
    mosaic_gpu_dscores,
    mosaic_gpu_vjp,
)
from kernels.attention.cases import (
    GPU_CASES,
    INTERPRETED_CASES,
    LARGE_CASES,
    AttentionCase,
)
from kernels.attention.flash import chunk_attention
from kernels.attention.spans import causal_spans
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp, record
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance

ALL_AT_ONCE = AttentionCase(
    name="all_at_once",
    tokens=1022,
    head_size=128,
    documents=(500, 33, 400),
    window=200,
    softcap=30.0,
)

LARGE = [
    case
    for case in LARGE_CASES
    if case.head_size != 128 or (case.documents and (case.softcap or case.window))
]
"""Of the large ones those that `GPU_CASES` have no like of."""


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def output_and_gradients(function, arrays, *, times=1):
    """Returns the results; of several runs of one program, a list of them."""
    dout = np.random.default_rng(5).normal(size=arrays[0].shape).astype(np.float32)
    dout = jnp.asarray(dout).astype(jnp.bfloat16).astype(arrays[0].dtype)

    @jax.jit
    def run(dout, *arrays):
        out, pullback = jax.vjp(function, *arrays)
        return out, *pullback(dout)

    results = [run(dout, *arrays) for _ in range(times)]
    return results if times > 1 else results[0]


def check(case, run, **more):
    arrays, options = case.arrays(jnp.bfloat16), case.options() | more
    floats = tuple(x.astype(jnp.float32) for x in arrays)

    def op(implementation):
        def call(*arrays):
            return attention(*arrays, implementation=implementation, **options)

        return call

    actual = run(op("mosaic_gpu"), arrays)
    expected = output_and_gradients(op("xla"), floats)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(got, np.float32)).all()
        assert relative_error(got, want) < tolerance(jnp.bfloat16)


@pytest.mark.parametrize(
    ("case", "more"),
    [
        *((case, {}) for case in INTERPRETED_CASES),
        (INTERPRETED_CASES[0], {"keeps_dscores": False}),
    ],
    ids=lambda value: value.name if isinstance(value, AttentionCase) else str(value),
)
def test_matches_in_the_interpreter(case, more, monkeypatch):
    # So few that a thread block takes several blocks of queries or keys.
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 3)
    monkeypatch.setattr(mosaic_gpu_dscores, "multiprocessors", lambda: 1)
    monkeypatch.setattr(mosaic_gpu_vjp, "multiprocessors", lambda: 1)

    def run(function, arrays):
        with interpreted():
            return output_and_gradients(function, arrays)

    check(case, run, **more)


@pytest.mark.gpu(HOPPER)
@named([*GPU_CASES, *LARGE, ALL_AT_ONCE])
def test_matches_at_real_shapes(case):
    check(case, output_and_gradients)


@pytest.mark.gpu(HOPPER)
@named(GPU_CASES)
def test_matches_with_scores_made_anew(case):
    check(case, output_and_gradients, keeps_dscores=False)


@pytest.mark.gpu(HOPPER)
@named(GPU_CASES[3:5])
def test_the_same_bits_each_time(case):
    arrays = case.arrays(jnp.bfloat16)

    def op(*arrays):
        return attention(*arrays, implementation="mosaic_gpu", **case.options())

    first, second = output_and_gradients(op, arrays, times=2)
    for x, y in zip(first, second, strict=True):
        assert jnp.array_equal(x, y)


def test_chunks_of_keys_add_up_to_the_row():
    case = INTERPRETED_CASES[0]
    q, k, v = (x[:, :64] for x in case.arrays(jnp.bfloat16))
    scale = case.head_size**-0.5

    def in_chunks(q, k, v):
        outs, lses = [], []
        for start in (0, 32):
            spans = causal_spans(1, 64, 32, k_offset=start)
            chunk = slice(start, start + 32)
            out, lse = chunk_attention(q, k[:, chunk], v[:, chunk], spans, scale=scale)
            sees = (spans.end > spans.first)[:, None]
            outs.append(out.astype(jnp.float32))
            lses.append(jnp.where(sees, lse, -jnp.inf))
        shares = jnp.swapaxes(jax.nn.softmax(jnp.stack(lses), axis=0), 2, 3)
        return sum(x * y[..., None] for x, y in zip(outs, shares, strict=True))

    with interpreted(detect_races=False):
        actual = jax.jit(in_chunks)(q, k, v)
    floats = (x.astype(jnp.float32) for x in (q, k, v))
    expected = attention(*floats, implementation="reference")
    assert relative_error(actual, expected) < tolerance(jnp.bfloat16)


def launches(function, *arrays):
    """Returns how often each kernel stands in the program for a Hopper GPU."""
    with assume_compute_capability(HOPPER):
        traced = jax.jit(function).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return collections.Counter(re.findall(r"dump_basename\\00(\w+?)_\d+\\00", text))


@pytest.mark.parametrize(("saved", "forwards"), [(RESIDUAL_NAMES, 1), ((), 2)])
def test_saved_residuals_spare_the_forward_pass(saved, forwards):
    arrays = INTERPRETED_CASES[0].arrays(jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def objective(*arrays):
        def block(q, k, v):
            out = attention(jnp.sin(q), k, v, implementation="mosaic_gpu")
            return out.astype(jnp.float32).sum()

        return jax.checkpoint(block, policy=policy)(*arrays)

    actual = launches(jax.value_and_grad(objective, argnums=(0, 1, 2)), *arrays)
    assert actual == {
        "attention_forward": forwards,
        "attention_dq_product": 1,
        "attention_dkv": 1,
    }


@pytest.mark.parametrize(
    ("options", "dq"),
    [
        ({}, "attention_dq_product"),
        ({"keeps_dscores": False}, "attention_dq"),
        ({"softcap": 30.0}, "attention_dq"),
    ],
)
def test_gradients_of_scores_are_kept_where_they_may_be(options, dq):
    (case,) = (case for case in INTERPRETED_CASES if case.name == "keys_not_shared")
    arrays = case.arrays(jnp.bfloat16)

    def objective(*arrays):
        out = attention(*arrays, implementation="mosaic_gpu", **options)
        return out.astype(jnp.float32).sum()

    kernels = launches(jax.grad(objective, argnums=(0, 1, 2)), *arrays)
    assert kernels == {"attention_forward": 1, dq: 1, "attention_dkv": 1}


def test_gradients_of_scores_are_kept_of_short_rows_only():
    def kept(tokens, heads=32, head_size=128):
        shape = (2, tokens, heads, head_size)
        return dscores_bytes(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    # Half of all pairs, and half a block more of the diagonal.
    assert kept(4096) == 2 * 32 * 4096 * (4096 + 128) // 2 * 2
    assert kept(4000) == kept(4096)
    assert kept(8192) == kept(4096, heads=31) == kept(4096, head_size=80) == 0


def test_layers_of_a_scan_may_differ_in_their_window():
    case = INTERPRETED_CASES[0]
    arrays = case.arrays(jnp.bfloat16)
    windows = jnp.array([7, 2**30], jnp.int32)

    def layers(implementation):
        def call(q, k, v):
            def layer(x, window):
                options = {"window": window, "implementation": implementation}
                return attention(x, k, v, segment_ids=ids, **options), None

            return jax.lax.scan(layer, q, windows)[0]

        return call

    ids = case.segment_ids()
    with interpreted():
        actual = output_and_gradients(layers("mosaic_gpu"), arrays)
        jax.block_until_ready(actual)
    floats = tuple(x.astype(jnp.float32) for x in arrays)
    expected = output_and_gradients(layers("xla"), floats)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < tolerance(jnp.bfloat16, terms=2)


@pytest.mark.parametrize(
    ("head_size", "is_packed", "options", "default"),
    [
        (128, True, {}, "mosaic_gpu"),
        (64, True, {}, "mosaic_gpu"),
        (256, True, {"softcap": 30.0}, "mosaic_gpu"),
        (256, False, {"softcap": 30.0}, "mosaic_gpu"),
        (256, False, {"softcap": 30.0, "window": 7}, "mosaic_gpu"),
        (64, False, {"softcap": 30.0}, "xla"),
        (128, True, {"window": 7}, "mosaic_gpu"),
        (128, True, {"window": 7, "softcap": 30.0}, "mosaic_gpu"),
        *((size, True, {"window": 7}, "mosaic_gpu") for size in (64, 80, 96, 256)),
        (256, True, {"window": 7, "softcap": 30.0}, "mosaic_gpu"),
        (128, True, {"window": jnp.int32(7)}, "mosaic_gpu"),
        (256, True, {"window": jnp.int32(7)}, "mosaic_gpu"),
        (256, True, {"window": jnp.int32(7), "softcap": 30.0}, "mosaic_gpu"),
        (128, False, {"window": jnp.int32(7)}, "mosaic_gpu"),
        (256, False, {"window": jnp.int32(7)}, "mosaic_gpu"),
    ],
)
def test_the_default_on_hopper(head_size, is_packed, options, default):
    q = jax.ShapeDtypeStruct((1, 128, 2, head_size), jnp.bfloat16)
    ids = jnp.ones((1, 128), jnp.int32) if is_packed else None

    def op(*arrays):
        return attention(*arrays, segment_ids=ids, **options)

    with assume_compute_capability(HOPPER), record() as chosen:
        jax.eval_shape(op, q, q, q)
    assert chosen == {"attention": {default}}


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((1, 8, 2, 64), jnp.float32, {}, "bfloat16 or float16"),
        ((1, 8, 2, 72), jnp.bfloat16, {}, "head_size=72 must be one of"),
        ((1, 8, 2, 64), jnp.bfloat16, {"scale": -1.0}, "above 0"),
        (
            (1, 8, 2, 64),
            jnp.bfloat16,
            {"q_index": jnp.zeros((1, 8), jnp.int32)},
            "whole row",
        ),
        (
            (1, 8, 2, 64),
            jnp.bfloat16,
            {
                "segment_ids": jnp.ones((1, 8), jnp.int32),
                "q_segment_ids": jnp.ones((1, 8), jnp.int32),
            },
            "same array",
        ),
    ],
)
def test_what_it_lacks_is_refused(shape, dtype, options, message):
    q = jnp.ones(shape, dtype)
    with (
        assume_compute_capability(HOPPER),
        pytest.raises(UnsupportedOp, match=message),
    ):
        attention(q, q, q, implementation="mosaic_gpu", **options)


def test_other_devices_are_refused():
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with (
        assume_compute_capability((8, 0)),
        pytest.raises(UnsupportedOp, match="found compute"),
    ):
        attention(q, q, q, implementation="mosaic_gpu")
