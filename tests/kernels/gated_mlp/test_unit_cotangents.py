"""The unit's gradient with its narrow products against the same in plain jnp."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from kernels.device import HOPPER
from kernels.dispatch import UnsupportedOp
from kernels.gated_mlp.reference import gated_activation
from kernels.gated_mlp.unit_cotangents import UnitCotangents, unit_cotangents
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance

ROWS = 192
CASES = (
    ((16, 8, 8), 256, "silu"),
    ((8, 0, 16), 256, "silu"),
    ((0, 8, 0), 384, "gelu_pytorch_tanh"),
)
"""Ranks, features and activation; two blocks have one and two tiles of the rows."""


def _arguments(ranks, features):
    shapes = (
        *[(ROWS, features)] * 3,
        (sum(ranks[:2]), features),
        (sum(ranks), ROWS),
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def _actual(ranks, features, activation) -> UnitCotangents:
    slabs = features // (256 if features % 256 == 0 else 128)
    return unit_cotangents(
        *_arguments(ranks, features),
        ranks=ranks,
        activation=activation,
        blocks=2 * slabs,
    )


def _check(ranks, features, activation, actual: UnitCotangents) -> None:
    gate, up, dout, ups, narrow = (
        x.astype(jnp.float32) for x in _arguments(ranks, features)
    )

    def unit(gate, up):
        return gated_activation(gate, up, activation=activation)

    out, pullback = jax.vjp(unit, gate, up)
    dgate, dup = pullback(dout)
    starts = [0, *itertools.accumulate(ranks)]
    dxa = [
        dout @ ups[i:j].T
        for dout, (i, j) in zip((dgate, dup), itertools.pairwise(starts), strict=False)
    ]
    sums = [
        wide.T @ narrow[i:j].T
        for wide, (i, j) in zip(
            (dgate, dup, out), itertools.pairwise(starts), strict=True
        )
    ]
    added = [part.sum(axis=0) for part in actual[2:]]
    expected = [dgate, dup, *(jnp.concatenate(part, axis=1) for part in (dxa, sums))]
    for got, want in zip((*actual[:2], *added), expected, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < tolerance(jnp.bfloat16, terms=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2])
def test_matches_in_the_interpreter(case):
    with interpreted():
        actual = jax.block_until_ready(_actual(*case))
    _check(*case, actual)


@pytest.mark.gpu(HOPPER)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2])
def test_matches_on_hopper(case):
    _check(*case, _actual(*case))


@pytest.mark.parametrize(
    ("ranks", "features"), [((40, 8, 8), 256), ((0, 0, 8), 256), ((8, 8, 8), 192)]
)
def test_other_sizes_are_refused(ranks, features):
    with pytest.raises(UnsupportedOp, match="do not suit the tiles"):
        _actual(ranks, features, "silu")
