"""What Nsight Compute (ncu) counts while programs run on this device.

ncu runs this process again, which runs each program once to compile it, and once
between calls that start and stop the profiler. A kernel of its own parts the programs'
kernels in the report.
"""

import csv
import ctypes
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .benchmarking import run_of
from .program import Program

PROFILED = (
    *("lora_matmul.forward/8192_up", "lora_matmul.ready/8192_up"),
    *("lora_matmul.dx/8192_up", "lora_matmul.ready_dx/8192_up"),
    *(f"lora_matmul.forward/{rows}_up" for rows in (1, 16, 64)),
    *("attention.both/llama3_8b", "attention.both/llama3_8b_16_documents"),
    "cross_entropy.loss_and_gradient/llama3_8b",
)
"""Programs whose kernels decide what a step, or a decoded token, takes."""

_SEPARATOR = "wrapped_negate"
"""XLA's name for the kernel of a lone negation, which no program launches."""

_KERNELS = f"regex:mosaic_gpu|nvjet|gemm|{_SEPARATOR}"
"""Products and kernels of this package; of XLA's others only the separator."""

_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
_STALL = "smsp__average_warps_issue_stalled_"
_STALL_END = "_per_issue_active.ratio"
_STALLS_KEPT = 4
_KERNEL, _GRID = "Kernel Name", "Grid Size"

_METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "hertz": "gpc__cycles_elapsed.avg.per_second",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu_percent": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_percent_of_elapsed": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
    ),
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}


def profile(launcher: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Returns what ncu says of each program's kernels.

    Args:
      launcher: A command that calls `launch`; no other process may hold the GPU's
        memory meanwhile, so make no array before.

    Raises:
      RuntimeError: ncu failed.
    """
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    options = ["--profile-from-start=off", "--clock-control=none", "--csv"]
    options += ["--page=raw", "--print-units=base", f"--kernel-name={_KERNELS}"]
    done = subprocess.run(
        ["ncu", *options, *sections, *launcher],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ncu failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read(done.stdout.splitlines())


def launch(programs: Iterable[Program]) -> None:
    """Runs each program's first implementation for a profiler that waits."""
    driver = ctypes.CDLL("libcuda.so.1")
    separator = jax.jit(jnp.negative)
    one = jnp.float32(1)
    jax.block_until_ready(separator(one))
    for program in programs:
        arguments = jax.jit(program.arguments)()
        run = run_of(program, program.implementations[0])
        jax.block_until_ready(run(*arguments))
        _checked(driver.cuProfilerStart())
        jax.block_until_ready(separator(one))
        jax.block_until_ready(run(*arguments))
        _checked(driver.cuProfilerStop())
        del arguments


def read(report: Iterable[str]) -> list[list[dict[str, Any]]]:
    """Returns the kernels of each program from ncu's raw page as CSV.

    Equal launches are one entry with the medians of their numbers. The stall reasons
    kept are the largest, in cycles of a warp an instruction.
    """
    lines = [line for line in report if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]  # the first one holds the units
    programs: list[dict[tuple[str, str], list[dict[str, str]]]] = []
    for row in rows:
        if row[_KERNEL] == _SEPARATOR:
            programs.append({})
        else:
            programs[-1].setdefault((row[_KERNEL], row[_GRID]), []).append(row)
    return [
        [
            {"kernel": name, "grid": grid, "launches": len(same), **_numbers(same)}
            for (name, grid), same in kernels.items()
        ]
        for kernels in programs
    ]


def _numbers(launches: list[dict[str, str]]) -> dict[str, Any]:
    def median(metric: str) -> float:
        values = [float(row[metric].replace(",", "")) for row in launches]
        return round(statistics.median(values), 2)

    stalls = {
        name.removeprefix(_STALL).removesuffix(_STALL_END): median(name)
        for name in launches[0]
        if name.startswith(_STALL) and name.endswith(_STALL_END)
    }
    largest = sorted(stalls, key=lambda reason: -stalls[reason])[:_STALLS_KEPT]
    numbers = {name: median(metric) for name, metric in _METRICS.items()}
    return {**numbers, "stalls": {reason: stalls[reason] for reason in largest}}


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver's profiler control returned {status}")
