"""Attention: every implementation against the reference, and that against NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels import dispatch
from kernels.attention import RESIDUAL_NAMES, attention
from kernels.attention.cases import CASES, AttentionCase
from kernels.numerics import relative_error, tolerance

DTYPES = (jnp.float32, jnp.bfloat16)
TILED = [case for case in CASES if case.name.startswith("tiles")]
BY_NAME = {case.name: case for case in CASES}


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def output_and_gradients(arrays, implementation, **options):
    q, *_ = arrays
    dout = np.random.default_rng(5).normal(size=q.shape).astype(np.float32)
    dout = jnp.asarray(dout).astype(jnp.bfloat16).astype(q.dtype)

    @jax.jit
    def run(q, k, v):
        def op(q, k, v):
            return attention(q, k, v, implementation=implementation, **options)

        out, pullback = jax.vjp(op, q, k, v)
        return out, *pullback(dout)

    return run(*arrays)


def in_float32(arrays):
    return tuple(x.astype(jnp.float32) for x in arrays)


@named(CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_xla_matches_the_float32_reference(case, dtype):
    arrays, options = case.arrays(dtype), case.options()
    actual = output_and_gradients(arrays, "xla", **options)
    expected = output_and_gradients(in_float32(arrays), "reference", **options)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < tolerance(dtype, terms=3)


@named([case for case in CASES if case.tokens < 100])
def test_the_reference_matches_numpy(case):
    arrays, options = case.arrays(jnp.float32), case.options()
    actual = attention(*arrays, implementation="reference", **options)
    numbers = (np.asarray(x, np.float64) for x in arrays)
    plain = {key: x if x is None else np.asarray(x) for key, x in options.items()}
    expected = by_loops(*numbers, plain)
    assert relative_error(actual, expected) < tolerance(jnp.float32, terms=2)


def by_loops(q, k, v, options):
    """Attention one query at a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = list(visible_keys(b, t, k.shape[1], options))
        if not keys:
            continue
        scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        if options["softcap"] is not None:
            scores = options["softcap"] * np.tanh(scores / options["softcap"])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, n // group] / weights.sum()
    return out


def visible_keys(b, t, tokens, options):
    index = int(options["q_index"][b, t]) if "q_index" in options else t
    window = tokens if options["window"] is None else int(options["window"])
    ids = options.get("segment_ids")
    for s in range(max(0, index + 1 - window), index + 1):
        if ids is None or ids[b, s] == ids[b, index] != 0:
            yield s


def test_causal_attention_matches_jax():
    arrays = BY_NAME["odd"].arrays(jnp.float32)
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True)
    for implementation in ("reference", "xla"):
        actual = attention(*arrays, implementation=implementation)
        assert relative_error(actual, expected) < tolerance(jnp.float32, terms=3)


@named([BY_NAME["window"], BY_NAME["tiles_window_softcap"]])
def test_a_traced_window_equals_a_static_one(case):
    arrays, options = case.arrays(jnp.float32), case.options()
    static = output_and_gradients(arrays, "xla", **options)
    traced = output_and_gradients(
        arrays, "xla", **(options | {"window": jnp.int32(case.window)})
    )
    for got, want in zip(traced, static, strict=True):
        assert relative_error(got, want) < tolerance(jnp.float32)


@named([BY_NAME["padded"], BY_NAME["tiles_packed"]])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_gives_zeros_and_gets_no_gradient(case, implementation):
    arrays, options = case.arrays(jnp.float32), case.options()
    padding = np.asarray(options["segment_ids"]) == 0
    assert padding.any()
    for x in output_and_gradients(arrays, implementation, **options):
        x = np.asarray(x)
        assert np.isfinite(x).all()
        assert not x[padding].any()


@named([BY_NAME["packed"], BY_NAME["tiles_packed"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_documents_cannot_change_a_bit(case, dtype):
    arrays, options = case.arrays(dtype), case.options()
    first = np.asarray(options["segment_ids"]) == 1
    changed = tuple(
        jnp.where(first[:, :, None, None], y, x)
        for x, y in zip(arrays, case.arrays(dtype, seed=1), strict=True)
    )
    before = output_and_gradients(arrays, "xla", **options)
    after = output_and_gradients(changed, "xla", **options)
    for x, y in zip(before, after, strict=True):
        assert np.array_equal(np.asarray(x)[~first], np.asarray(y)[~first])
        assert not np.array_equal(np.asarray(x)[first], np.asarray(y)[first])


def test_packed_documents_equal_documents_alone():
    case = BY_NAME["packed"]
    q, k, v = case.arrays(jnp.float32)
    packed = attention(q, k, v, implementation="xla", **case.options())
    second = np.flatnonzero(np.asarray(case.segment_ids())[0] == 2)
    part = slice(second[0], second[-1] + 1)
    alone = attention(q[:1, part], k[:1, part], v[:1, part], implementation="xla")
    assert relative_error(packed[:1, part], alone) < tolerance(jnp.float32)


def test_decoding_token_by_token_equals_the_whole_row():
    q, k, v = BY_NAME["odd"].arrays(jnp.float32)
    whole = attention(q, k, v)
    step = jax.jit(lambda q, index: attention(q, k, v, q_index=index))
    for t in (0, 5, q.shape[1] - 1):
        index = jnp.full((q.shape[0], 1), t, jnp.int32)
        actual = step(q[:, t : t + 1], index)
        assert relative_error(actual, whole[:, t : t + 1]) < tolerance(jnp.float32)


def test_tokens_after_the_row_of_a_longer_cache_are_not_seen():
    q, k, v = BY_NAME["odd"].arrays(jnp.float32)
    prompt = q[:, :9]
    actual = attention(prompt, k, v)
    expected = attention(prompt, k[:, :9], v[:, :9])
    assert relative_error(actual, expected) < tolerance(jnp.float32)


def test_gradients_are_deterministic():
    case = BY_NAME["tiles_packed"]
    arrays, options = case.arrays(jnp.bfloat16), case.options()
    first = output_and_gradients(arrays, "xla", **options)
    second = output_and_gradients(arrays, "xla", **options)
    for x, y in zip(first, second, strict=True):
        assert jnp.array_equal(x, y)


def test_vmap_equals_a_loop():
    q, k, v = BY_NAME["tiles"].arrays(jnp.float32)
    index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]

    def op(q, shift):
        return attention(q, k, v, q_index=index - shift)

    shifts = jnp.array([0, 3], jnp.int32)
    actual = jax.vmap(op)(jnp.stack([q, 2 * q]), shifts)
    expected = jnp.stack([op(q, shifts[0]), op(2 * q, shifts[1])])
    assert relative_error(actual, expected) < tolerance(jnp.float32)


def compiled_bytes(tokens):
    case = AttentionCase(
        name="long", batch=1, tokens=tokens, heads=2, kv_heads=1, head_size=8
    )
    arrays = case.arrays(jnp.float32)

    def objective(*arrays):
        return attention(*arrays, implementation="xla").sum()

    step = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))
    return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    short, middle, long = (compiled_bytes(tokens) for tokens in (2048, 4096, 8192))
    assert long - middle <= 2.2 * (middle - short)


@pytest.mark.parametrize(
    ("window", "tiles"), [(None, 10), (512, 7), (1, 4), (5000, 10)]
)
def test_hidden_tiles_are_not_visited(window, tiles):
    case = AttentionCase(name="long", batch=1, tokens=2048, heads=1, kv_heads=1)
    arrays = case.arrays(jnp.float32)
    jaxpr = jax.make_jaxpr(
        lambda *arrays: attention(*arrays, window=window, implementation="xla")
    )(*arrays)
    assert [scan.params["length"] for scan in equations(jaxpr.jaxpr, "scan")] == [tiles]


def equations(jaxpr, name):
    """Every equation of that primitive, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, name)


def test_one_tile_needs_no_scan():
    arrays = BY_NAME["packed"].arrays(jnp.float32)
    jaxpr = jax.make_jaxpr(lambda *arrays: attention(*arrays))(*arrays)
    assert not list(equations(jaxpr.jaxpr, "scan"))


@pytest.mark.parametrize(("saved", "exponentials"), [(RESIDUAL_NAMES, 3), ((), 5)])
def test_saved_residuals_spare_the_forward_pass(saved, exponentials):
    arrays = BY_NAME["packed"].arrays(jnp.float32)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @jax.jit
    def objective(*arrays):
        def block(q, k, v):
            return attention(jnp.sin(q), k, v).sum()

        return jax.checkpoint(block, policy=policy)(*arrays)

    jaxpr = jax.make_jaxpr(jax.grad(objective))(*arrays)
    assert len(list(equations(jaxpr.jaxpr, "exp"))) == exponentials


def test_the_record_names_xla_on_a_cpu():
    arrays = BY_NAME["odd"].arrays(jnp.bfloat16)
    with dispatch.record() as chosen:
        attention(*arrays)
    assert chosen == {"attention": {"xla"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"max_segments": 0}, "max_segments=0 must be at least 1"),
        ({"q_segment_ids": jnp.ones((2, 24), jnp.int32)}, "need segment_ids"),
        ({"implementation": "triton"}, "cudnn, xla, mosaic_gpu, mosaic_gpu_cudnn"),
    ],
)
def test_wrong_options_are_refused(options, message):
    arrays = BY_NAME["multi_query"].arrays(jnp.float32)
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **options)


def test_segments_of_a_cache_need_those_of_the_queries():
    q, k, v = BY_NAME["decode"].arrays(jnp.float32)
    with pytest.raises(ValueError, match="need q_segment_ids"):
        attention(q, k, v, segment_ids=jnp.ones(k.shape[:2], jnp.int32))


@pytest.mark.parametrize(
    ("k_shape", "v_dtype", "message"),
    [
        ((2, 8, 3, 16), jnp.float32, "multiple of key heads"),
        ((2, 8, 2, 12), jnp.float32, "shapes disagree"),
        ((1, 8, 2, 16), jnp.float32, "shapes disagree"),
        ((2, 8, 2, 16), jnp.bfloat16, "dtypes disagree"),
    ],
)
def test_wrong_arrays_are_refused(k_shape, v_dtype, message):
    unchecked = inspect.unwrap(attention)  # as users run it, without jaxtyping
    q, k = jnp.ones((2, 8, 4, 16)), jnp.ones(k_shape)
    with pytest.raises(ValueError, match=message):
        unchecked(q, k, k.astype(v_dtype))
