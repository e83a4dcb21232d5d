"""8-bit Adam against bitsandbytes' numbers, and every implementation alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from kernels.adam8bit import Blocks, adam8bit, mosaic_gpu
from kernels.adam8bit.blocks import MU_MAP, NU_MAP
from kernels.adam8bit.cases import INTERPRETED, ON_GPU, SMALL, Case
from kernels.adam8bit.ranks import MU_RANKS, NU_RANKS
from kernels.adam8bit.xla import codes_of
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.interpret import interpreted
from kernels.numerics import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("optimised")

BETAS = {"b1": 0.9, "b2": 0.999}


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def gradient_of(case: Case, step: int):
    """Neighbours differ by little, blocks by orders; one is zero, one almost."""
    values = np.random.default_rng(step).normal(size=case.shape).ravel()
    values *= 10.0 ** np.linspace(-4, 1, values.size)
    values[256:512] = 0
    values[512:768] = 1e-38
    return jnp.asarray(values.reshape(case.shape), jnp.float32)


def update(*arrays, implementation, eps=1e-8):
    return adam8bit(*arrays, **BETAS, eps=eps, implementation=implementation)


def after(case: Case, steps: int, implementation: str):
    """Returns direction and moments after some steps, the last by `implementation`."""
    size = int(np.prod(case.shape))
    mu, nu = Blocks.zeros(size), Blocks.zeros(size)
    arrays = (gradient_of(case, 1), mu, nu, jnp.int32(1))
    if steps > 1:
        _, mu, nu = after(case, steps - 1, "reference")
        arrays = (gradient_of(case, steps), mu, nu, jnp.int32(steps))
    return jax.jit(lambda *a: update(*a, implementation=implementation))(*arrays)


def check(actual, expected):
    """Values next to a midpoint may round otherwise, by one code."""
    assert relative_error(actual[0], expected[0]) < tolerance(jnp.float32, terms=4)
    for got, want in zip(actual[1:], expected[1:], strict=True):
        error = relative_error(got.absmax, want.absmax)
        assert error < tolerance(jnp.float32, terms=4)
        apart = np.abs(np.int32(got.codes) - np.int32(want.codes))
        assert apart.max() <= 1
        assert apart.mean() < 1e-4


@pytest.fixture(scope="module")
def bitsandbytes(fixtures):
    return load_file(fixtures / "adam8bit.safetensors")


def test_maps_are_those_of_bitsandbytes(bitsandbytes):
    np.testing.assert_array_equal(MU_MAP, bitsandbytes["signed_map"])
    np.testing.assert_array_equal(NU_MAP, bitsandbytes["unsigned_map"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_weights_and_states_are_those_of_bitsandbytes(bitsandbytes, implementation):
    weight = bitsandbytes["weight_0"]
    rate, decay = np.float32(1e-3), np.float32(0.01)
    mu, nu = Blocks.zeros(weight.size), Blocks.zeros(weight.size)
    run = jax.jit(lambda *arrays: update(*arrays, implementation=implementation))
    for step, gradient in enumerate(bitsandbytes["gradients"], start=1):
        direction, mu, nu = run(jnp.asarray(gradient), mu, nu, jnp.int32(step))
        weight = weight - rate * (np.asarray(direction) + decay * weight)
        np.testing.assert_allclose(weight, bitsandbytes[f"weight_{step}"], rtol=1e-6)
        for name, moment in (("mu", mu), ("nu", nu)):
            codes = np.asarray(moment.codes).ravel()[: weight.size]
            np.testing.assert_array_equal(codes, bitsandbytes[f"{name}_codes_{step}"])
            expected = bitsandbytes[f"{name}_absmax_{step}"]
            np.testing.assert_allclose(moment.absmax, expected, rtol=3e-7)


@pytest.mark.parametrize(
    ("values", "ranks"), [(MU_MAP, MU_RANKS), (NU_MAP, NU_RANKS)], ids=["mu", "nu"]
)
def test_the_table_finds_the_nearest_code(values, ranks):
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    below, above = (np.nextafter(midpoints, np.float32(end)) for end in (-2, 2))
    spread = np.geomspace(1e-9, 1, 20000, dtype=np.float32)
    x = np.concatenate([values, below, above, spread, -spread * (values[0] < 0)])
    x = np.setdiff1d(x, midpoints)  # half way, the table takes the smaller magnitude
    expected = np.searchsorted(midpoints, x)
    np.testing.assert_array_equal(codes_of(jnp.asarray(x), ranks), expected)


@named(SMALL)
def test_matches_the_reference(case):
    check(after(case, 2, "xla"), after(case, 2, "reference"))


@named(INTERPRETED)
def test_the_kernel_matches_in_the_interpreter(case, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 3)
    monkeypatch.setattr(mosaic_gpu, "_BLOCKS_OF_PROCESSOR", 1)
    with interpreted():
        actual = after(case, 2, "mosaic_gpu")
    check(actual, after(case, 2, "reference"))


@pytest.mark.gpu
@named(ON_GPU)
@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic_gpu", marks=pytest.mark.gpu(HOPPER))]
)
def test_matches_at_real_sizes(implementation, case):
    _, mu, nu = after(case, 1, "reference")
    bad = gradient_of(case, 1).ravel().at[:3].set(jnp.asarray([jnp.nan, jnp.inf, 1]))
    arrays = (bad.reshape(case.shape), mu, nu, jnp.int32(2))
    jax.block_until_ready(update(*arrays, implementation=implementation))
    check(after(case, 2, implementation), after(case, 2, "reference"))


def test_the_kernel_says_what_it_lacks():
    moment, step = Blocks.zeros(7 * 256), jnp.int32(1)
    gradient = jnp.zeros((7, 256))
    with (
        assume_compute_capability(HOPPER),
        pytest.raises(UnsupportedOp, match="blocks=7"),
    ):
        update(gradient, moment, moment, step, implementation="mosaic_gpu")
    with pytest.raises(UnsupportedOp, match="no CUDA GPU"):
        update(gradient, moment, moment, step, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="mu has 7 blocks"):
        update(jnp.zeros((8, 256)), moment, moment, step, implementation=None)
