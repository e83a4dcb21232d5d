"""The programs that are compiled and timed, and the arithmetic of the timing."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from kernels import benchmarking
from kernels.benchmarking import Ceilings
from kernels.compile_check import MAX_SHARED_BYTES, CompiledKernel
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.program import Program, nbytes
from kernels.programs import all_programs

PROGRAMS = all_programs()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_implementations_return_alike(program):
    arguments = jax.eval_shape(program.arguments)

    def shapes(implementation):
        def run(*arguments):
            return program.run(*arguments, implementation=implementation)

        return jax.eval_shape(run, *arguments)

    results = []
    for name in program.implementations:
        # A library that is not here.
        absent = (UnsupportedOp,) if "cudnn" in name else ()
        with assume_compute_capability(HOPPER), contextlib.suppress(*absent):
            results.append(shapes(name))
    assert results
    assert all(result == results[0] for result in results)
    moved = nbytes((arguments, results[0]))
    assert program.bytes_moved == pytest.approx(moved, rel=1e-3)
    assert bool(program.kernels) == ("mosaic_gpu" in program.implementations)


def test_program_names_are_unique():
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS)


def test_a_measurement():
    def run(x, *, implementation):
        scale = {"mosaic_gpu": 1.01, "xla": 1.0}[implementation]
        return (x * jnp.asarray(scale, x.dtype),)

    program = Program(
        name="double", run=run, arguments=lambda: (jnp.ones((1000,)),), bytes_moved=8000
    )
    limits = Ceilings(copy_bytes_per_second=1e9, matmul_flops_per_second=1e9)
    kernel, baseline = benchmarking.measure(program, limits, "wall")
    assert (kernel.implementation, baseline.implementation) == ("mosaic_gpu", "xla")
    assert kernel.relative_error == pytest.approx(0.01, rel=1e-3)
    assert (baseline.relative_error, baseline.speedup) == (0, 1)
    assert kernel.gigabytes_per_second == pytest.approx(8e-3 / kernel.ms)
    assert kernel.share_of_ceiling == pytest.approx(8e-3 / kernel.ms)
    assert kernel.speedup == pytest.approx(baseline.ms / kernel.ms)


def test_the_larger_of_two_ceilings_counts():
    limits = Ceilings(copy_bytes_per_second=10.0, matmul_flops_per_second=100.0)
    program = Program(name="", run=max, arguments=tuple, bytes_moved=50, flops=1000)
    assert limits.seconds(program) == 10


def test_faults_of_a_compiled_kernel():
    clean = CompiledKernel(
        name="k",
        registers=255,
        spill_bytes=0,
        shared_bytes=MAX_SHARED_BYTES,
        has_serialised_wgmma=False,
    )
    assert clean.faults() == []
    dirty = CompiledKernel(
        name="k",
        registers=255,
        spill_bytes=8,
        shared_bytes=MAX_SHARED_BYTES + 1,
        has_serialised_wgmma=True,
    )
    assert len(dirty.faults()) == 3
