"""The gated network: every case and implementation against the float32 reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch
from kernels.choice import fastest_first
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.gated_mlp import RESIDUAL_NAMES, gated_mlp
from kernels.gated_mlp.cases import (
    GPU_NETWORKS,
    INTERPRETED_NETWORKS,
    NETWORKS,
    NetworkCase,
)
from kernels.gated_mlp.programs import programs
from kernels.interpret import interpreted
from kernels.lora_matmul import Projection
from kernels.nf4 import quantize
from kernels.numerics import relative_error, tolerance

RANK_64 = dataclasses.replace(GPU_NETWORKS[1], name="rank_64", ranks=(64,) * 3)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _projection(
    case: NetworkCase, inputs: int, outputs: int, rank: int, key: jax.Array
) -> Projection:
    def normal(index: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    weight = (normal(0, inputs, outputs) * inputs**-0.5).astype(jnp.bfloat16)
    adapter = {}
    if rank:
        adapter = {
            "lora_a": normal(1, inputs, rank) * inputs**-0.5,
            "lora_b": normal(2, rank, outputs) * 0.3,
            "scaling": jnp.float32(0.5),
        }
    return Projection(
        quantize(weight) if case.is_quantized else weight,
        bias=normal(3, outputs) if case.has_bias else None,
        **adapter,
    )


@functools.cache
def _arguments(case: NetworkCase) -> tuple[Any, ...]:
    """Returns x and the residual, what is trained, what is frozen, and a cotangent."""
    keys = jax.random.split(jax.random.key(1), 6)
    shape = (1, case.rows, case.inputs)
    x, residual, dout = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in keys[3:]
    )
    *inner, last = case.ranks
    widths = [2 * case.features // len(inner)] * len(inner)
    projections = [
        _projection(case, case.inputs, width, rank, key)
        for width, rank, key in zip(widths, inner, keys, strict=False)
    ]
    down = _projection(case, case.features, case.inputs, last, keys[2])
    names = ("bias", "lora_a", "lora_b")
    trained = [{n: getattr(p, n) for n in names} for p in (*projections, down)]
    frozen = [(p.weight, p.scaling) for p in (*projections, down)]
    hidden = (x, residual) if case.has_residual else (x,)
    return hidden, trained, frozen, dout


def _network(case: NetworkCase, hidden, trained, frozen, **options: Any) -> jax.Array:
    *inner, down = (
        Projection(weight, scaling=scaling, **own)
        for (weight, scaling), own in zip(frozen, trained, strict=True)
    )
    return gated_mlp(
        hidden[0],
        tuple(inner),
        down,
        activation=case.activation,
        residual=hidden[1] if len(hidden) == 2 else None,
        **options,
    )


def _results(case: NetworkCase, arguments: tuple[Any, ...], implementation: str) -> Any:
    """Returns the result, then the gradients of x, the residual, what is trained."""

    @jax.jit
    def run(hidden, trained, frozen, dout):
        y, pullback = jax.vjp(
            lambda *floats: _network(
                case, *floats, frozen, implementation=implementation
            ),
            hidden,
            trained,
        )
        return y, pullback(dout)

    return run(*arguments)


def _in_float32(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, trained, frozen, dout = arguments
    hidden, dout = jax.tree.map(lambda x: x.astype(jnp.float32), (hidden, dout))
    return hidden, trained, frozen, dout


def _check(case: NetworkCase, arguments: tuple[Any, ...], actual: Any) -> None:
    expected = _results(case, _in_float32(arguments), "reference")
    for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert got.shape == want.shape
        limit = tolerance(arguments[0][0].dtype, terms=6)
        assert relative_error(got, want) < limit
    for got, had in zip(
        jax.tree.leaves(actual[1]), jax.tree.leaves(arguments[:2]), strict=True
    ):
        assert got.dtype == had.dtype


@named(NETWORKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla_matches_the_reference(case, dtype):
    arguments = _arguments(case)
    if dtype == "float32":
        arguments = _in_float32(arguments)
    _check(case, arguments, _results(case, arguments, "xla"))


@named(INTERPRETED_NETWORKS)
def test_kernels_match_in_the_interpreter(case):
    arguments = _arguments(case)
    with interpreted():
        actual = _results(case, arguments, "mosaic_gpu")
    _check(case, arguments, actual)


@pytest.mark.gpu(HOPPER)
@named([*INTERPRETED_NETWORKS, *GPU_NETWORKS, RANK_64])
def test_kernels_match_on_hopper(case):
    arguments = _arguments(case)
    actual, again = (_results(case, arguments, "mosaic_gpu") for _ in range(2))
    plain = _results(case, arguments, "xla")
    expected = _results(case, _in_float32(arguments), "reference")
    leaves = map(jax.tree.leaves, (actual, again, plain, expected))
    for got, repeated, beside, want in zip(*leaves, strict=True):
        assert jnp.array_equal(got, repeated)
        # Sums of a few rows may be exact.
        least = max(relative_error(beside, want), tolerance("float32"))
        assert relative_error(got, want) < 1.5 * least


def test_gate_and_up_are_saved_by_name():
    """The backward pass with both makes no product of `x` again."""
    case = dataclasses.replace(INTERPRETED_NETWORKS[0], has_residual=False)
    hidden, trained, frozen, _ = _arguments(case)

    def launches(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names, "lora_xa")

        network = jax.checkpoint(
            lambda x: _network(case, (x,), trained, frozen), policy=policy
        )
        loss = jax.grad(lambda x: jnp.sum(network(x).astype(jnp.float32)))
        with assume_compute_capability(HOPPER):
            return str(jax.make_jaxpr(loss)(hidden[0])).count("accumulated_products")

    assert launches(*RESIDUAL_NAMES) < launches()


@pytest.mark.parametrize(
    ("ranks", "is_one"),
    [
        ((64, 64, 64), False),
        ((0, 0, 4), False),
        ((20, 0, 0), False),
        ((12, 0, 0), True),
    ],
)
def test_ranks_decide_where_the_narrow_products_are(ranks, is_one):
    case = dataclasses.replace(INTERPRETED_NETWORKS[0], ranks=ranks)
    hidden, trained, frozen, _ = _arguments(case)

    def loss(trained):
        y = _network(case, hidden, trained, frozen, implementation="mosaic_gpu")
        return jnp.sum(y.astype(jnp.float32))

    with assume_compute_capability(HOPPER):
        traced = str(jax.make_jaxpr(jax.grad(loss))(trained))
    assert ("unit_cotangents" in traced) == is_one


@pytest.mark.parametrize(("rows", "expected"), [(2048, "mosaic_gpu"), (2050, "xla")])
def test_the_choice_on_hopper(rows, expected):
    case = INTERPRETED_NETWORKS[0]
    _, trained, frozen, _ = _arguments(case)
    x = jax.ShapeDtypeStruct((rows, case.inputs), jnp.bfloat16)
    with assume_compute_capability(HOPPER), dispatch.record() as chosen:
        jax.eval_shape(lambda x: _network(case, (x,), trained, frozen), x)
    assert chosen["gated_mlp"] == {expected}


@pytest.mark.parametrize(
    ("case", "expected"),
    [*zip(GPU_NETWORKS, ("mosaic_gpu",) * 3, strict=True)],
)
def test_the_default_is_what_was_faster(case, expected):
    sizes = {"rows": case.rows, "inputs": case.inputs, "outputs": case.features}
    with assume_compute_capability(HOPPER):
        order = fastest_first("gated_mlp", sizes, {"mosaic_gpu": 0, "xla": 0})
    assert next(iter(order)) == expected


def test_composed_products_add_the_residual_in_their_epilogue():
    (program,) = (p for p in programs() if p.name == "gated_mlp.network/llama3_8b")
    run = functools.partial(program.run, implementation="xla")
    with assume_compute_capability(HOPPER):
        traced = str(jax.make_jaxpr(run)(*jax.eval_shape(program.arguments)))
    assert "accumulated_products" in traced
    assert "bf16[8192,4096] = add" not in traced


def test_the_kernel_says_what_it_lacks():
    def run(case: NetworkCase, **options: Any) -> None:
        hidden, trained, frozen, _ = _arguments(case)
        _network(case, hidden, trained, frozen, implementation="mosaic_gpu", **options)

    case = INTERPRETED_NETWORKS[1]
    with assume_compute_capability(HOPPER):
        with pytest.raises(UnsupportedOp, match="gate and up are one weight"):
            run(dataclasses.replace(case, ranks=(0, 0)))
        with pytest.raises(UnsupportedOp, match="lora_matmul is to run by 'xla'"):
            run(case, product_implementation="xla")
        keys = tuple(jax.random.split(jax.random.key(0), 3))
        with pytest.raises(UnsupportedOp, match="no dropout"):
            run(case, dropout_rate=0.1, dropout_keys=keys)


def test_wrong_use_is_named():
    hidden, trained, frozen, _ = _arguments(NETWORKS[0])
    bad = dataclasses.replace(NETWORKS[0], activation="relu")
    with pytest.raises(ValueError, match="silu, gelu_pytorch_tanh"):
        _network(bad, hidden, trained, frozen)
    case = NETWORKS[0]
    with pytest.raises(ValueError, match="x has 16 features, the weight 32 inputs"):
        _network(case, hidden, trained[1:], frozen[1:])
    x, residual = hidden
    gate, up, down = (Projection(jnp.ones(s)) for s in ((24, 16), (24, 32), (24, 24)))
    with pytest.raises(ValueError, match=r"gate and up .* they have \[16, 32\]"):
        gated_mlp(x, (gate, up), down, activation="silu")
    with pytest.raises(ValueError, match="x has 24 features, down 16 outputs"):
        gated_mlp(x, (down, down), gate, activation="silu")
    with pytest.raises(ValueError, match=r"a residual must be like .* it is float32"):
        _network(case, (x, residual.astype(jnp.float32)), trained, frozen)
