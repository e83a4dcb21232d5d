"""The gated unit with its product in one kernel, against the float32 reference."""

import jax
import jax.numpy as jnp
import pytest

from kernels.device import HOPPER, multiprocessors
from kernels.dispatch import UnsupportedOp
from kernels.gated_mlp import reference
from kernels.gated_mlp.cases import GPU_NETWORKS, NetworkCase
from kernels.gated_mlp.unit_product import MAX_RANK, gated_unit_product
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance


def _arguments(rows: int, features: int, rank: int, dtype: str) -> list[jax.Array]:
    """Returns gate, whose values reach both flat ends, up and down."""
    keys = jax.random.split(jax.random.key(0), 3)
    scales = (4.0, 1.0, features**-0.5)
    return [
        (scale * jax.random.normal(key, (height, features))).astype(dtype)
        for key, height, scale in zip(keys, (rows, rows, rank), scales, strict=True)
    ]


def _check(actual: tuple[jax.Array, ...], arguments: list[jax.Array], activation: str):
    gate, up, down = (a.astype(jnp.float32) for a in arguments)
    h, xa = actual
    assert (h.dtype, xa.dtype) == (arguments[0].dtype,) * 2
    expected = reference.gated_activation(gate, up, activation=activation)
    assert relative_error(h, expected) < tolerance(h.dtype)
    # The product is that of the rounded unit.
    expected = jnp.dot(h.astype(jnp.float32), down.T, precision="highest")
    assert relative_error(xa, expected) < tolerance(h.dtype)


@pytest.mark.parametrize(
    ("rows", "features", "rank", "activation", "dtype"),
    [
        # More steps than stages.
        (128, 896, 16, "silu", "bfloat16"),
        # Two parts of the product, and another rank.
        (64, 1024, 24, "gelu_pytorch_tanh", "float16"),
        # A single step.
        (64, 128, MAX_RANK, "silu", "bfloat16"),
    ],
)
def test_matches_in_the_interpreter(rows, features, rank, activation, dtype):
    arguments = _arguments(rows, features, rank, dtype)
    with interpreted():
        actual = gated_unit_product(*arguments, activation=activation, blocks=2)
    _check(actual, arguments, activation)


@pytest.mark.gpu(HOPPER)
@pytest.mark.parametrize("case", GPU_NETWORKS, ids=lambda case: case.name)
def test_matches_on_hopper(case: NetworkCase):
    arguments = _arguments(case.rows, case.features, case.ranks[-1], "bfloat16")
    blocks, activation = multiprocessors(), case.activation
    actual, again = (
        gated_unit_product(*arguments, activation=activation, blocks=blocks)
        for _ in range(2)
    )
    assert all(map(jnp.array_equal, actual, again))
    _check(actual, arguments, activation)


@pytest.mark.parametrize(
    ("rows", "features", "rank"),
    [(96, 128, 16), (64, 192, 16), (64, 128, 12), (64, 128, MAX_RANK + 8)],
)
def test_other_sizes_are_refused(rows, features, rank):
    arguments = _arguments(rows, features, rank, "bfloat16")
    with pytest.raises(UnsupportedOp, match=f"rank={rank} do not suit"):
        gated_unit_product(*arguments, activation="silu", blocks=2)
