"""The interpreter of Mosaic GPU kernels: what it adds, and that it sees races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import interpret
from kernels.device import compute_capability
from kernels.numerics import relative_error
from kernels.stand_in import stand_in

ROW = plgpu.Layout.WG_STRIDED((128,), 1)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def normal(*shape):
    x = np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)
    return jnp.asarray(x).astype(jnp.bfloat16)


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def product_of(body, *operands):
    """Runs a kernel that writes a (64, 64) product of its operands."""
    run = plgpu.kernel(
        body,
        out_type=float32(64, 64),
        scratch_types=[plgpu.SMEM((64, 64), jnp.bfloat16, transforms=TILED)] * 2
        + [plgpu.Barrier()],
        num_threads=1,
        thread_name="wg",
    )
    with interpret.interpreted():
        return jax.jit(run)(*operands)


def load(source, target, barrier):
    plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def test_wgmma_takes_its_left_operand_from_registers():
    def body(a, b, out, a_smem, b_smem, barrier):
        load(a, a_smem, barrier)
        load(b, b_smem, barrier)

        def multiply(acc):
            plgpu.wgmma(acc, plgpu.load(a_smem, layout=plgpu.Layout.WGMMA), b_smem)
            plgpu.wgmma_wait(0)
            return acc[...]

        out[...] = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32))

    a, b = normal(64, 64), 2 * normal(64, 64)
    expected = a.astype(jnp.float32) @ b.astype(jnp.float32)
    assert relative_error(product_of(body, a, b), expected) < 1e-6


def test_accumulators_start_from_a_value_and_can_be_stored_to():
    def body(a, b, out, a_smem, b_smem, barrier):
        load(a, a_smem, barrier)
        load(b, b_smem, barrier)
        start = jnp.full((64, 64), 3, jnp.float32)

        def multiply(acc):
            plgpu.wgmma(acc, a_smem, b_smem)
            plgpu.wgmma_wait(0)

        once = pl.run_state(multiply)(plgpu.ACC.init(start))

        def again(acc):
            acc[...] = once
            plgpu.wgmma(acc, a_smem, b_smem)
            plgpu.wgmma_wait(0)
            return acc[...]

        out[...] = pl.run_scoped(again, plgpu.ACC((64, 64), jnp.float32))

    a, b = normal(64, 64), 2 * normal(64, 64)
    expected = 2 * (a.astype(jnp.float32) @ b.astype(jnp.float32)) + 3
    assert relative_error(product_of(body, a, b), expected) < 1e-6


def scaled(x_ref, factor_ref):
    """Machine code that does not exist: only its stand-in can run."""
    result = plgpu.ShapeDtypeStruct((128,), jnp.float32, ROW)

    @plgpu.inline_mgpu(arg_types=(ROW, plgpu.RefType()), return_type=result)
    @stand_in(lambda x, factor: x * factor[0])
    def multiply(_, x, factor):
        raise NotImplementedError

    return multiply(plgpu.load(x_ref, layout=ROW), factor_ref.at[pl.ds(1, 1)])


def test_machine_code_runs_as_its_stand_in():
    def body(x, factors, out):
        out[...] = scaled(x, factors)

    x = jnp.arange(128, dtype=jnp.float32)
    with interpret.interpreted():
        actual = plgpu.kernel(body, out_type=float32(128))(x, jnp.asarray([2.0, 5.0]))
    np.testing.assert_array_equal(actual, 5 * x)


def shifted(x, *, with_barrier):
    """Two warpgroups hand a row on through shared memory."""

    def body(x_ref, out, smem, barrier):
        wg = lax.axis_index("wg")

        @pl.when(wg == 0)
        def _():
            smem[...] = x_ref[...]
            if with_barrier:
                plgpu.barrier_arrive(barrier)

        @pl.when(wg == 1)
        def _():
            if with_barrier:
                plgpu.barrier_wait(barrier)
            out[...] = smem[...] + 1.0

    return plgpu.kernel(
        body,
        out_type=float32(128),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        num_threads=2,
        thread_name="wg",
    )(x)


def test_ordered_accesses_pass():
    x = jnp.arange(128, dtype=jnp.float32)
    with interpret.interpreted():
        actual = jax.jit(functools.partial(shifted, with_barrier=True))(x)
    np.testing.assert_array_equal(actual, x + 1)


def test_a_race_is_found(capsys):
    x = jnp.arange(128, dtype=jnp.float32)
    with pytest.raises(interpret.RaceFound), interpret.interpreted():
        jax.block_until_ready(shifted(x, with_barrier=False))
    assert "RACE DETECTED" in capsys.readouterr().out


def test_the_device_is_assumed_only_inside():
    outside = compute_capability()
    with interpret.interpreted():
        assert compute_capability() == (9, 0)
    assert compute_capability() == outside


def test_another_jax_is_refused(monkeypatch):
    monkeypatch.setattr(interpret, "JAX_VERSION", "0.11.1")
    with (
        pytest.raises(RuntimeError, match=r"uses private parts of JAX 0\.11\.1"),
        interpret.interpreted(),
    ):
        pass
