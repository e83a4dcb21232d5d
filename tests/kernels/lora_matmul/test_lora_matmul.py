"""LoRA products: every case and implementation against the float32 reference."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.interpret import interpreted
from kernels.lora_matmul import (
    Projection,
    check_residual,
    lora_matmul,
    lora_matmul_group,
)
from kernels.lora_matmul.cases import INTERPRETED, LARGE, RATED, SMALL, Case
from kernels.lora_matmul.dropout import dropped, kept_scale
from kernels.lora_matmul.few_rows import MAX_ROWS
from kernels.nf4 import NF4Array, dequantize, quantize
from kernels.numerics import relative_error, tolerance

CASES = {case.name: case for case in SMALL}

SHORT = [case for case in RATED if case.lead == (2048,)]
"""Few tokens for the kernels of training, whose sums have fewer parts then."""


def _normal(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = "float32"
) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _projection(case: Case, index: int, dtype: str, key: jax.Array) -> Projection:
    keys = jax.random.split(key, 5)
    outputs, rank = case.outputs[index], case.ranks[index]
    weight = (_normal(keys[0], (case.inputs, outputs)) * 0.2).astype(dtype)
    adapter = {}
    if rank:
        adapter = {
            "lora_a": _normal(keys[1], (case.inputs, rank)) * 0.3,
            "lora_b": _normal(keys[2], (rank, outputs)) * 0.3,
            "scaling": jnp.float32(0.5 + index),
        }
    return Projection(
        quantize(weight) if case.is_quantized else weight,
        bias=_normal(keys[3], (outputs,)) if case.has_bias else None,
        magnitude=1 + _normal(keys[4], (outputs,)) ** 2 if case.has_magnitude else None,
        **adapter,
    )


def _inputs(case: Case, dtype: str) -> tuple[jax.Array, tuple[Projection, ...], tuple]:
    keys = jax.random.split(jax.random.key(3), 2 * len(case.outputs) + 1)
    count = len(case.outputs)
    projections = tuple(_projection(case, i, dtype, keys[i]) for i in range(count))
    x = _normal(keys[-1], (*case.lead, case.inputs), dtype)
    return x, projections, tuple(keys[count:-1])


def _trained(projection: Projection) -> dict[str, jax.Array]:
    names = ("bias", "lora_a", "lora_b", "magnitude")
    found = {name: getattr(projection, name) for name in names}
    return {name: array for name, array in found.items() if array is not None}


def _with(
    projection: Projection, trained: dict[str, jax.Array], weight: Any = None
) -> Projection:
    return Projection(
        projection.weight if weight is None else weight,
        **{"scaling": projection.scaling, **_trained(projection), **trained},
    )


def _value_and_grads(
    case: Case, x: jax.Array, projections: tuple, keys: tuple, implementation: str
) -> tuple[tuple[jax.Array, ...], Any]:
    """Outputs, and the gradients of a fixed random combination of them."""
    run = _gradients(case, projections, keys, implementation)
    gradients, outputs = run(*_arguments(x, projections))
    return outputs, gradients


def _arguments(x: jax.Array, projections: tuple) -> tuple:
    """What a program takes; as a constant of it, a large weight costs minutes."""
    return x, [_trained(p) for p in projections], [p.weight for p in projections]


def _gradients(case: Case, projections: tuple, keys: tuple, implementation: str) -> Any:
    """Compiled: from x and what is trained to their gradients and the outputs."""

    def loss(x: jax.Array, trained: list[dict], weights: list) -> tuple[Any, tuple]:
        group = tuple(map(_with, projections, trained, weights))
        outputs = lora_matmul_group(
            x,
            group,
            dropout_rate=case.dropout_rate,
            dropout_keys=keys,
            implementation=implementation,
        )
        cotangents = [
            _normal(jax.random.key(i), y.shape, y.dtype) for i, y in enumerate(outputs)
        ]
        terms = [
            jnp.sum(y.astype(jnp.float32) * c.astype(jnp.float32))
            for y, c in zip(outputs, cotangents, strict=True)
        ]
        return sum(terms[1:], terms[0]), outputs

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in CASES),
        *((name, "bfloat16") for name in ("qkv_mixed", "dropout", "dora")),
        ("gate_up_joined", "float16"),
    ],
)
def test_xla_matches_the_reference(name: str, dtype: str) -> None:
    case = CASES[name]
    x, projections, keys = _inputs(case, dtype)
    actual = _value_and_grads(case, x, projections, keys, "xla")
    _assert_exact(case, actual, dtype)


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_kernels_match_in_the_interpreter(case: Case) -> None:
    x, projections, keys = _inputs(case, "bfloat16")
    keys = (None,) * len(keys)
    with interpreted():
        actual = _value_and_grads(case, x, projections, keys, "mosaic_gpu")
    _assert_exact(case, actual, "bfloat16")


@pytest.mark.parametrize("case", INTERPRETED[1:3], ids=lambda case: case.name)
def test_kernels_lower_for_hopper(case: Case) -> None:
    """The interpreter copies what the copy engine would refuse."""
    x, projections, keys = _inputs(case, "bfloat16")
    run = _gradients(case, projections, (None,) * len(keys), "mosaic_gpu")
    with assume_compute_capability(HOPPER):
        traced = run.trace(*_arguments(x, projections))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu(HOPPER)
@pytest.mark.parametrize(
    "case", [*INTERPRETED, *LARGE, *SHORT], ids=lambda case: case.name
)
def test_kernels_match_on_hopper(case: Case) -> None:
    x, projections, keys = _inputs(case, "bfloat16")
    keys = (None,) * len(keys)
    run = _gradients(case, projections, keys, "mosaic_gpu")
    (gradients, outputs), again = (run(*_arguments(x, projections)) for _ in range(2))
    actual = outputs, gradients
    leaves = map(jax.tree.leaves, ((gradients, outputs), again))
    assert all(map(jnp.array_equal, *leaves))
    plain = _value_and_grads(case, x, projections, keys, "xla")
    if math.prod(case.lead) <= MAX_ROWS:
        projections = tuple(map(_unrounded, projections))
    expected = _value_and_grads(
        case, x.astype(jnp.float32), projections, keys, "reference"
    )
    leaves = map(jax.tree.leaves, (actual, plain, expected))
    for got, with_xla, want in zip(*leaves, strict=True):
        # Sums of a few rows may be exact.
        least = max(relative_error(with_xla, want), tolerance("float32"))
        assert relative_error(got, want) < 1.5 * least


def _unrounded(projection: Projection) -> Projection:
    """Dequantised to float32, as the kernel of few rows takes 4-bit weights."""
    assert isinstance(projection.weight, NF4Array)
    weight = dataclasses.replace(projection.weight, dtype="float32")
    return dataclasses.replace(projection, weight=weight)


def _assert_exact(case: Case, actual: tuple, dtype: str) -> None:
    """Compares outputs, gradients and their dtypes with the reference's."""
    x, projections, keys = _inputs(case, dtype)
    if not case.dropout_rate:
        keys = (None,) * len(keys)
    # The reference computes in float32 from the same (rounded) inputs.
    exact = (
        x.astype(jnp.float32),
        tuple(_with_weight(p, p.weight) for p in projections),
    )
    expected = _value_and_grads(case, *exact, keys, "reference")
    limit = tolerance(dtype, terms=4)
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert got.shape == want.shape
        assert relative_error(got, want) < limit
    assert actual[1][0].dtype == x.dtype
    for got, had in zip(actual[1][1], projections, strict=True):
        assert {k: v.dtype for k, v in got.items()} == {
            k: v.dtype for k, v in _trained(had).items()
        }


def _with_weight(projection: Projection, weight: Any) -> Projection:
    return Projection(weight, scaling=projection.scaling, **_trained(projection))


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla", "reference"])
def test_a_residual_is_added(implementation: str) -> None:
    """Here by the kernel of few rows; that of many adds to the gated network's."""
    case = dataclasses.replace(INTERPRETED[2], outputs=(256,), ranks=(4,))
    x, projections, _ = _inputs(case, "bfloat16")
    residual = _normal(jax.random.key(9), (5, 256), "bfloat16")

    def run(residual: jax.Array | None) -> jax.Array:
        (y,) = lora_matmul_group(
            x, projections, residual=residual, implementation=implementation
        )
        return y.astype(jnp.float32)

    with interpreted():
        added, pullback = jax.vjp(run, residual)
        alone = run(None)
    assert relative_error(added, alone + residual.astype("float32")) < 5e-3
    assert jnp.array_equal(pullback(jnp.ones_like(added))[0], jnp.ones_like(residual))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["qkv_mixed", "dropout", "dora"])
def test_a_group_equals_its_members(name: str, implementation: str) -> None:
    case = CASES[name]
    x, projections, keys = _inputs(case, "float32")
    options = {"dropout_rate": case.dropout_rate, "implementation": implementation}
    group = lora_matmul_group(x, projections, dropout_keys=keys, **options)
    for projection, key, together in zip(projections, keys, group, strict=True):
        alone = lora_matmul(
            x,
            projection.weight,
            projection.lora_a,
            projection.lora_b,
            scaling=projection.scaling,
            bias=projection.bias,
            magnitude=projection.magnitude,
            dropout_key=key,
            **options,
        )
        assert relative_error(together, alone) < tolerance("float32")


def test_the_formula_in_numpy() -> None:
    x, (p,), _ = _inputs(CASES["one"], "float32")
    x64, w, a, b = (
        np.asarray(t, np.float64) for t in (x, p.weight, p.lora_a, p.lora_b)
    )
    actual = lora_matmul(x, p.weight, p.lora_a, p.lora_b, scaling=2.0)
    assert relative_error(actual, x64 @ w + 2 * x64 @ a @ b) < tolerance("float32")


def test_dora_in_numpy() -> None:
    """`magnitude * direction`, the direction's length taken as a constant."""
    case = CASES["dora"]
    x, projections, _ = _inputs(case, "float32")
    p = projections[0]
    w = np.asarray(dequantize(p.weight), np.float64)
    x64, a, b, m, bias = (
        np.asarray(t, np.float64) for t in (x, p.lora_a, p.lora_b, p.magnitude, p.bias)
    )
    adapted = w + float(p.scaling) * a @ b
    expected = x64 @ (m * adapted / np.linalg.norm(adapted, axis=0)) + bias
    for implementation in ("xla", "reference"):
        (actual,) = lora_matmul_group(x, (p,), implementation=implementation)
        assert relative_error(actual, expected) < tolerance("float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dora_norm_is_accurate_to_float32(dtype: str) -> None:
    from kernels.lora_matmul.dora import column_norm

    keys = jax.random.split(jax.random.key(0), 3)
    w = (_normal(keys[0], (256, 40)) * 0.02).astype(dtype)
    a, b = _normal(keys[1], (256, 8)) * 0.05, _normal(keys[2], (8, 40)) * 0.05
    actual = jax.jit(column_norm)(w, a, b, jnp.float32(2))
    w64, a64, b64 = (np.asarray(t).astype(np.float64) for t in (w, a, b))
    expected = np.linalg.norm(w64 + 2 * a64 @ b64, axis=0)
    assert np.abs(actual / expected - 1).max() < 1e-6


def test_dropout_keeps_the_mean_and_repeats_itself() -> None:
    x = jnp.ones((400, 16))
    w, a, b = jnp.zeros((16, 4)), jnp.eye(16), jnp.ones((16, 4)) / 16
    run = jax.jit(
        lambda key: lora_matmul(
            x, w, a, b, scaling=1.0, dropout_rate=0.25, dropout_key=key
        )
    )
    first = run(jax.random.key(0))
    # 6,400 draws: the standard error of the mean is 0.0072.
    assert abs(float(first.mean()) - 1) < 0.03
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert (first != run(jax.random.key(1))).any()
    kept = lora_matmul(x, w, a, b, scaling=1.0, dropout_rate=0.25)
    np.testing.assert_allclose(kept, 1, rtol=1e-6)


def test_dropout_keeps_the_mean_of_16_bit_activations() -> None:
    """The factor 1 / 0.9, rounded to bfloat16, would lower the mean by 0.16 %."""
    x = jnp.ones((2**16, 64), jnp.bfloat16)
    w, a, b = jnp.zeros((64, 1)), jnp.ones((64, 1)), jnp.full((1, 1), 1 / 64)
    run = jax.jit(
        lambda x: lora_matmul(
            x,
            w.astype(x.dtype),
            a,
            b,
            scaling=1.0,
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
        )
    )
    # 4 million draws: the standard error of the mean is 0.00016.
    assert abs(float(run(x).astype(jnp.float32).mean()) - 1) < 6e-4


@pytest.mark.parametrize(("rate", "share"), [(0.3, 0.3), (1e-7, 0), (1 - 1e-7, 1)])
def test_the_share_that_dropout_drops(rate: float, share: float) -> None:
    mask = dropped(jnp.ones((2000, 501)), jax.random.key(2), rate)
    # A million draws: the standard error of the share is 0.0005.
    assert abs(1 - float(mask.mean()) - share) < 0.002
    assert 1 <= kept_scale(jax.random.key(2), rate) <= 2**16
    # Neighbours that share a word of random bits are independent.
    both = (1 - mask[:, 0:500:2]) * (1 - mask[:, 1:500:2])
    assert abs(float(both.mean()) - share**2) < 0.003


@pytest.mark.parametrize("has_magnitude", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_follows_the_product_adds_no_rounding(
    has_magnitude: bool, is_quantized: bool
) -> None:
    case = Case(
        name="",
        lead=(300,),
        inputs=64,
        outputs=(48,),
        ranks=(4,),
        is_quantized=is_quantized,
        has_bias=True,
        has_magnitude=has_magnitude,
    )
    x, (p,), _ = _inputs(case, "bfloat16")
    # 16-bit adapters of a small branch, whose own rounding does not count.
    rounded = {
        k: t.astype("bfloat16").astype("float32") for k, t in _trained(p).items()
    }
    p = dataclasses.replace(_with(p, rounded), scaling=jnp.float32(0.0625))
    run = jax.jit(lora_matmul_group, static_argnames="implementation")
    (exact,) = run(x.astype(jnp.float32), (p,), implementation="reference")
    (actual,) = run(x, (p,), implementation="xla")
    least = relative_error(exact.astype(jnp.bfloat16), exact)
    assert relative_error(actual, exact) < 1.2 * least


def _saved_floats(
    case: Case, implementation: str, is_quantized: bool
) -> list[tuple[int, ...]]:
    """Shapes of the float arrays kept for the backward pass that were not given."""
    x, projections, keys = _inputs(
        dataclasses.replace(case, is_quantized=is_quantized), "bfloat16"
    )

    def run(x: jax.Array, trained: list[dict]) -> tuple[jax.Array, ...]:
        return lora_matmul_group(
            x,
            tuple(map(_with, projections, trained)),
            dropout_rate=case.dropout_rate,
            dropout_keys=keys,
            implementation=implementation,
        )

    _, pullback = jax.vjp(run, x, [_trained(p) for p in projections])
    given = {id(leaf) for leaf in jax.tree.leaves((x, projections))}
    saved = [t for t in jax.tree.leaves(pullback) if id(t) not in given]
    return [t.shape for t in saved if jnp.issubdtype(t.dtype, jnp.floating)]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_nothing_of_the_weights_size_is_saved(is_quantized: bool) -> None:
    """No float matrix made from the weight, no array of (rows, outputs)."""
    case = Case(
        name="",
        lead=(64,),
        inputs=48,
        outputs=(80, 80),
        ranks=(4, 4),
        has_magnitude=True,
        has_bias=True,
        dropout_rate=0.1,
    )
    large = {(48, 80), (80, 48), (64, 80)}
    saved = _saved_floats(case, "xla", is_quantized)
    assert (64, 4) in saved
    assert not large & set(saved)
    # The same look at plain differentiation finds them.
    assert large & set(_saved_floats(case, "reference", is_quantized))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_scan_over_stacked_layers(use_checkpoint: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    case = Case(
        name="", lead=(6,), inputs=32, outputs=(32,), ranks=(4,), is_quantized=True
    )
    layers = [_projection(case, 0, "float32", key) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = _normal(jax.random.key(1), (6, 32))

    def scanned(x: jax.Array, a: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            projection, a = layer
            (y,) = lora_matmul_group(x, (_with(projection, {"lora_a": a}),))
            return jnp.tanh(y), None

        if use_checkpoint:
            body = jax.checkpoint(body)
        return jnp.sum(jax.lax.scan(body, x, (stacked, a))[0])

    def unrolled(x: jax.Array, a: jax.Array) -> jax.Array:
        for i, layer in enumerate(layers):
            (y,) = lora_matmul_group(
                x, (_with(layer, {"lora_a": a[i]}),), implementation="reference"
            )
            x = jnp.tanh(y)
        return jnp.sum(x)

    actual = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, stacked.lora_a)
    expected = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(x, stacked.lora_a)
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert relative_error(got, want) < tolerance("float32", terms=6)


def test_the_choice_is_recorded() -> None:
    x, projections, _ = _inputs(CASES["qkv_mixed"], "float32")
    with dispatch.record() as chosen:
        jax.eval_shape(lambda x: lora_matmul_group(x, projections), x)
    assert chosen == {"lora_matmul": {"xla"}, "nf4": {"xla"}}


@pytest.mark.parametrize(("rows", "expected"), [(2048, "mosaic_gpu"), (2050, "xla")])
def test_the_choice_on_hopper(rows: int, expected: str) -> None:
    _, projections, _ = _inputs(INTERPRETED[0], "bfloat16")
    x = jax.ShapeDtypeStruct((rows, INTERPRETED[0].inputs), jnp.bfloat16)
    with assume_compute_capability(HOPPER), dispatch.record() as chosen:
        jax.eval_shape(lambda x: lora_matmul_group(x, projections), x)
    assert chosen["lora_matmul"] == {expected}


def test_kernels_say_what_they_lack() -> None:
    def run(case: Case, dtype: str = "bfloat16", **options: Any) -> None:
        x, projections, keys = _inputs(case, dtype)
        options = {"dropout_rate": case.dropout_rate, "dropout_keys": keys, **options}
        lora_matmul_group(x, projections, implementation="mosaic_gpu", **options)

    case = INTERPRETED[1]
    with assume_compute_capability(HOPPER):
        with pytest.raises(UnsupportedOp, match="no dropout"):
            run(dataclasses.replace(case, dropout_rate=0.1))
        with pytest.raises(UnsupportedOp, match="no DoRA"):
            run(dataclasses.replace(case, has_magnitude=True))
        with pytest.raises(UnsupportedOp, match="must be one of bfloat16"):
            run(case, "float32")
        with pytest.raises(UnsupportedOp, match=r"rows=100 .* multiples of 128"):
            run(dataclasses.replace(case, lead=(100,)))
        with pytest.raises(UnsupportedOp, match="ranks of the group exceed 256"):
            run(dataclasses.replace(case, ranks=(300,)))


def test_wrong_use_is_named() -> None:
    x, (p,), _ = _inputs(CASES["one"], "float32")

    def run(projection: Projection, x: jax.Array = x, **options: Any) -> None:
        lora_matmul_group(x, (projection,), **options)

    with pytest.raises(ValueError, match="x has 23 features, the weight 24 inputs"):
        run(p, x[:, :23])
    wrong_a = _with(p, {"lora_a": jnp.ones((4, 24))})
    with pytest.raises(ValueError, match=r"lora_a has shape \(4, 24\)"):
        run(wrong_a)
    with pytest.raises(
        ValueError, match=r"lora_b has shape \(3, 32\), expected \(4, 32"
    ):
        run(_with(p, {"lora_b": jnp.ones((3, 32))}))
    with pytest.raises(ValueError, match=r"bias has shape \(31,\), expected \(32,\)"):
        run(_with(p, {"bias": jnp.ones(31)}))
    with pytest.raises(ValueError, match="needs lora_a, lora_b and scaling"):
        run(Projection(p.weight, lora_a=p.lora_a, lora_b=p.lora_b))
    with pytest.raises(ValueError, match="magnitude"):
        run(Projection(p.weight, magnitude=jnp.ones(32)))
    with pytest.raises(ValueError, match=r"dropout_rate=1\.0"):
        run(p, dropout_rate=1.0)
    with pytest.raises(ValueError, match=r"a residual must be like .* \(40, 32\)"):
        lora_matmul_group(x, (p,), residual=x)
    with pytest.raises(ValueError, match=r"a residual must be like .* it is bfloat16"):
        lora_matmul_group(x, (p,), residual=jnp.ones((40, 32), jnp.bfloat16))
    # As many numbers, other tokens'.
    with pytest.raises(ValueError, match=r"a residual must be like .* \(8, 5, 32\)"):
        check_residual(x.reshape(8, 5, 24), (p,), jnp.ones((5, 8, 32)))
    with pytest.raises(ValueError, match="1 projections, 2 dropout keys"):
        run(p, dropout_keys=(None, None))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_float32_products_take_no_tf32(case: Case) -> None:
    x, projections, keys = _inputs(case, "float32")
    actual = _value_and_grads(case, x, projections, keys, "xla")
    expected = _value_and_grads(case, x, projections, keys, "reference")
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        # TF32 would give 3e-4.
        assert relative_error(got, want) < tolerance("float32", terms=4)
