"""The programs that are compiled and timed, and the arithmetic of the timing."""

import jax
import jax.numpy as jnp
import pytest

from kernels import benchmarking
from kernels.compile_check import MAX_SHARED_BYTES, CompiledKernel
from kernels.device import HOPPER, assume_compute_capability
from kernels.program import Program, nbytes
from kernels.programs import all_programs

PROGRAMS = all_programs()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_kernel_and_its_baseline_return_alike(program):
    arguments = jax.eval_shape(program.arguments)

    def shapes(implementation):
        def run(*arguments):
            return program.run(*arguments, implementation=implementation)

        return jax.eval_shape(run, *arguments)

    with assume_compute_capability(HOPPER):
        actual = shapes("mosaic_gpu")
    expected = shapes(program.baseline)
    assert actual == expected
    moved = nbytes((arguments, actual))
    assert program.bytes_moved == pytest.approx(moved, rel=1e-3)


def test_program_names_are_unique():
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS)


def test_a_measurement():
    def run(x, *, implementation):
        scale = {"mosaic_gpu": 1.01, "xla": 1.0}[implementation]
        return (x * jnp.asarray(scale, x.dtype),)

    program = Program(
        name="double",
        kernels=(),
        run=run,
        arguments=lambda: (jnp.ones((1000,)),),
        bytes_moved=8000,
    )
    result = benchmarking.measure(program, "wall")
    assert result.relative_error == pytest.approx(0.01, rel=1e-3)
    assert result.baseline_relative_error == 0
    assert result.gigabytes_per_second == pytest.approx(8e-3 / result.ms)
    assert result.speedup == pytest.approx(result.baseline_ms / result.ms)


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
