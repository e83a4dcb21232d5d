"""Chunked cross-entropy against the float32 reference, and what it must not compute."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import (
    HeadAdapter,
    linear_cross_entropy,
    token_log_probs,
)
from kernels.cross_entropy.cases import INTERPRETED, LARGE, SMALL, TIMED, Case
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance

CASES = {case.name: case for case in SMALL}


def _inputs(case: Case, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(5), 4)
    hidden = jax.random.normal(keys[0], (case.rows, case.features)).astype(dtype)
    head = jax.random.normal(keys[1], (case.vocabulary, case.features)).astype(dtype)
    targets = jax.random.randint(keys[2], (case.rows,), 0, case.vocabulary)
    ignored = jax.random.uniform(keys[3], (case.rows,)) < case.ignored
    return hidden, head, jnp.where(ignored, -100, targets)


def _options(case: Case) -> dict[str, Any]:
    return {"softcap": case.softcap, "chunk_tokens": case.chunk_tokens}


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)


def _compare(actual: Any, expected: Any, dtype: str) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < tolerance(dtype, terms=3)


def _loss_and_gradients(
    case: Case, targets: jax.Array, head_is_trainable: bool, implementation: str
) -> Callable:
    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, count = linear_cross_entropy(
            hidden,
            head,
            targets,
            head_is_trainable=head_is_trainable,
            implementation=implementation,
            **_options(case),
        )
        return 0.3 * total, count

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("name", "dtype", "head_is_trainable"),
    [
        *((name, "float32", True) for name in CASES),
        *(("odd_chunks", dtype, True) for dtype in ("bfloat16", "float16")),
        *(("softcap", dtype, False) for dtype in ("float32", "bfloat16")),
    ],
)
def test_loss_and_gradients(name: str, dtype: str, head_is_trainable: bool) -> None:
    case = CASES[name]
    hidden, head, targets = _inputs(case, dtype)
    run = functools.partial(_loss_and_gradients, case, targets, head_is_trainable)
    actual = run("xla")(hidden, head)
    expected = run("reference")(*_float32(hidden, head))
    _compare(actual, expected, dtype)
    assert actual[1][0].dtype == hidden.dtype
    assert int(actual[0][1]) == np.sum(np.asarray(targets) != -100)
    assert head_is_trainable or not actual[1][1].any()
    alone, _ = linear_cross_entropy(hidden, head, targets, **_options(case))
    np.testing.assert_allclose(0.3 * alone, actual[0][0], rtol=1e-6)


@pytest.mark.parametrize("logit_scale", [1, 100])
def test_the_kernel_matches_in_the_interpreter(logit_scale: float) -> None:
    """Logits far above the target's take the other way, by XLA."""
    case = INTERPRETED[0]
    hidden, head, targets = _inputs(case, "bfloat16")
    head = head * jnp.asarray(logit_scale / case.features**0.5, head.dtype)
    run = functools.partial(_loss_and_gradients, case, targets, False)
    with interpreted():
        actual = run("mosaic_gpu")(hidden, head)
        options = _options(case) | {"implementation": "mosaic_gpu"}
        alone, _ = linear_cross_entropy(hidden, head, targets, **options)
        jax.block_until_ready((actual, alone))
    np.testing.assert_allclose(0.3 * alone, actual[0][0], rtol=1e-5)
    expected = run("reference")(*_float32(hidden, head))
    _compare(actual, expected, "bfloat16")
    assert not actual[1][0][np.asarray(targets) == -100].any()


@pytest.mark.gpu(HOPPER)
@pytest.mark.parametrize("case", TIMED, ids=lambda case: case.name)
def test_the_kernel_matches_at_real_shapes(case: Case) -> None:
    hidden, head, targets = _inputs(case, "bfloat16")
    head = head / jnp.asarray(case.features**0.5, head.dtype)
    run = functools.partial(_loss_and_gradients, case, targets, False)
    actual = run("mosaic_gpu")(hidden, head)
    expected = run("xla")(*_float32(hidden, head))
    for got, want in zip(
        jax.tree.leaves(actual)[:3], jax.tree.leaves(expected)[:3], strict=True
    ):
        error = relative_error(got.astype(jnp.float32), want)
        assert error < tolerance("bfloat16", terms=3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 3.0}, "softcap"),
        ({"head_is_trainable": True}, "gradient of the head"),
        ({"dtype": "float16"}, "must be bfloat16"),
        ({"vocabulary": 200}, "multiples of 128"),
        ({"features": 72}, "features=72"),
    ],
)
def test_the_kernel_says_what_it_lacks(changes: dict[str, Any], reason: str) -> None:
    sizes = {"vocabulary": 256, "features": 64, "dtype": "bfloat16"} | changes
    dtype, width = sizes.pop("dtype"), sizes.pop("features")
    hidden, head = (
        jnp.ones((8, width), dtype),
        jnp.ones((sizes.pop("vocabulary"), width), dtype),
    )
    targets = jnp.zeros((8,), jnp.int32)
    with assume_compute_capability(HOPPER), pytest.raises(UnsupportedOp, match=reason):
        linear_cross_entropy(
            hidden, head, targets, **sizes, implementation="mosaic_gpu"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_float32_products_take_no_tf32(case: Case) -> None:
    hidden, head, targets = _inputs(case, "float32")
    # Logits of a spread near 1, as a model has them.
    head = head / case.features**0.5
    run = functools.partial(_loss_and_gradients, case, targets, True)
    actual, expected = run("xla")(hidden, head), run("reference")(hidden, head)
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        # Sums of up to 128,256 float32 terms differ by their order; TF32 gives 3e-4.
        assert relative_error(got, want) < tolerance("float32", terms=50)


@pytest.mark.parametrize(
    ("name", "dtype", "head_is_trainable"),
    [
        ("all_ignored", "float32", False),
        ("odd_chunks", "float32", True),
        ("odd_chunks", "bfloat16", False),
        ("softcap", "float32", True),
    ],
)
def test_token_log_probs(name: str, dtype: str, head_is_trainable: bool) -> None:
    case = CASES[name]
    hidden, head, targets = _inputs(case, dtype)
    weights = jax.random.normal(jax.random.key(9), (case.rows,))

    def run(implementation: str) -> Callable:
        def score(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_probs = token_log_probs(
                hidden,
                head,
                targets,
                head_is_trainable=head_is_trainable,
                implementation=implementation,
                **_options(case),
            )
            return jnp.sum(weights * log_probs), log_probs

        return jax.jit(jax.grad(score, (0, 1), has_aux=True))

    actual = run("xla")(hidden, head)
    expected = run("reference")(*_float32(hidden, head))
    _compare(actual, expected, dtype)
    assert not actual[1][np.asarray(targets) == -100].any()


@pytest.mark.parametrize("function", [linear_cross_entropy, token_log_probs])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_the_head_stays_apart(function: Callable, dtype: str) -> None:
    """Its gradients too: no product makes one of the whole table."""
    case = CASES["softcap"]
    hidden, head, targets = _inputs(case, dtype)
    keys = jax.random.split(jax.random.key(8), 3)
    adapter = HeadAdapter(
        jax.random.normal(keys[0], (case.rows, 3)).astype(dtype),
        jax.random.normal(keys[1], (case.vocabulary, 3)),
    )
    weights = jax.random.normal(keys[2], (case.rows,))

    def score(implementation: str, hidden: jax.Array, adapter: Any) -> jax.Array:
        result = function(
            hidden,
            head,
            targets,
            adapter=adapter,
            implementation=implementation,
            **_options(case),
        )
        is_loss = function is linear_cross_entropy
        return 0.3 * result[0] if is_loss else jnp.sum(weights * result)

    run = jax.value_and_grad(functools.partial(score, "xla"), (0, 1))
    actual = run(hidden, adapter)
    exact = jax.value_and_grad(functools.partial(score, "reference"), (0, 1))
    wide = HeadAdapter(adapter.down.astype(jnp.float32), adapter.up)
    _compare(actual, exact(hidden.astype(jnp.float32), wide), dtype)
    assert actual[1][1].up.dtype == jnp.float32
    for equation in _equations(jax.make_jaxpr(run)(hidden, adapter).jaxpr):
        if equation.primitive.name == "dot_general":
            rows, columns = equation.outvars[0].aval.shape[-2:]
            assert rows != case.vocabulary or columns < case.features


def test_an_adapter_of_other_sizes_is_refused() -> None:
    hidden, head, targets = _inputs(CASES["one_chunk"], "float32")
    adapter = HeadAdapter(hidden[:, :3], head[:, :2])
    with pytest.raises(ValueError, match=r"adapter of down=\(24, 3\)"):
        linear_cross_entropy(hidden, head, targets, adapter=adapter)


def test_the_kernel_has_no_adapter() -> None:
    hidden, head = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((256, 64), jnp.bfloat16)
    adapter, targets = HeadAdapter(hidden[:, :4], head[:, :4]), jnp.zeros(8, jnp.int32)
    options = {"adapter": adapter, "implementation": "mosaic_gpu"}
    with assume_compute_capability(HOPPER), pytest.raises(UnsupportedOp, match="adapt"):
        linear_cross_entropy(hidden, head, targets, **options)


def test_the_loss_in_numpy() -> None:
    hidden, head, targets = _inputs(CASES["softcap"], "float32")
    h, w, t = (np.asarray(x, np.float64) for x in (hidden, head, targets))
    logits = 3 * np.tanh(h @ w.T / 3)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.flatnonzero(t != -100)
    expected = -log_probs[rows, t[rows].astype(int)].sum()
    loss, count = linear_cross_entropy(hidden, head, targets, softcap=3.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert count == rows.size


def test_gradient_by_finite_differences() -> None:
    hidden, head, targets = _inputs(CASES["softcap"], "float32")
    direction = jax.random.normal(jax.random.key(1), hidden.shape)

    def loss(step: jax.Array) -> jax.Array:
        moved = hidden + step * direction
        return linear_cross_entropy(moved, head, targets, softcap=3.0, chunk_tokens=16)[
            0
        ]

    step = 1e-2
    numeric = (loss(jnp.float32(step)) - loss(jnp.float32(-step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0)), numeric, rtol=2e-3)


def test_large_logits_stay_finite() -> None:
    hidden, head, targets = _inputs(CASES["even_chunks"], "float32")
    loss, _ = linear_cross_entropy(hidden * 1e4, head, targets)
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("outside", [256, 1000])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla", "reference"])
def test_a_target_outside_the_vocabulary_shows(
    implementation: str, outside: int
) -> None:
    case = INTERPRETED[0]
    hidden, head, targets = _inputs(case, "bfloat16")
    run = _loss_and_gradients(case, targets.at[3].set(outside), False, implementation)
    options = _options(case) | {"implementation": implementation}
    with interpreted():
        (loss, _), _ = run(hidden, head)
        alone, _ = linear_cross_entropy(
            hidden, head, targets.at[3].set(outside), **options
        )
        jax.block_until_ready((loss, alone))
    assert jnp.isnan(loss)
    assert jnp.isnan(alone)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("function", [linear_cross_entropy, token_log_probs])
@pytest.mark.parametrize("head_is_trainable", [False, True])
def test_no_whole_logits_and_no_frozen_head_gradient(
    function: Callable, head_is_trainable: bool
) -> None:
    case = CASES["odd_chunks"]
    hidden, head, targets = _inputs(case, "bfloat16")

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        result = function(
            hidden,
            head,
            targets,
            head_is_trainable=head_is_trainable,
            **_options(case),
        )
        return jnp.sum(jax.tree.leaves(result)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(hidden, head)
    equations = list(_equations(jaxpr.jaxpr))
    chunk = -(-case.rows // 4)
    products = [e for e in equations if e.primitive.name == "dot_general"]
    shapes = {e.outvars[0].aval.shape for e in products}
    expected = {(chunk, case.vocabulary), (chunk, case.features)}
    head_shape = (case.vocabulary, case.features)
    assert shapes == expected | ({head_shape} if head_is_trainable else set())
    for product in products:
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype("bfloat16")}
    sizes = [v.aval.size for e in equations for v in e.outvars if v.aval.shape]
    limit = max(chunk * case.vocabulary, case.vocabulary * case.features)
    assert max(sizes) <= limit < case.rows * case.vocabulary


def test_wrong_use_is_named() -> None:
    hidden, head, targets = _inputs(CASES["one_chunk"], "float32")
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy(hidden, head, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="softcap=-1"):
        token_log_probs(hidden, head, targets, softcap=-1.0)
    with pytest.raises(ValueError, match="no implementation 'liger'"):
        linear_cross_entropy(hidden, head, targets, implementation="liger")


def test_the_kernel_of_the_loss_has_no_log_probs() -> None:
    arrays = _inputs(CASES["one_chunk"], "float32")
    with pytest.raises(UnsupportedOp, match="log-probability of each row"):
        token_log_probs(*arrays, implementation="mosaic_gpu")
