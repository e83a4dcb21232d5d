"""What `scripts/check_kernels.py` and `scripts/bench_kernels.py` run.

The modules that need jax are imported inside the commands, so that `--help` is quick.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

_RESULTS = Path("benchmarks/results/kernels.json")


def check_kernels() -> int:
    """Compiles every kernel for Hopper without a GPU; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compiles kernels without a GPU.")
    parser.add_argument("--only", default="", help="part of a program's name")
    only = parser.parse_args().only
    folder = os.environ.get("MOSAIC_GPU_DUMP_TO")
    if not folder or not os.environ.get("MOSAIC_GPU_DUMP_PTXAS"):
        sys.stderr.write("run `make check-kernels`, which sets MOSAIC_GPU_DUMP_TO\n")
        return 2
    faults = _check(only, Path(folder))
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    return 1 if faults else 0


def _check(only: str, dump: Path) -> list[str]:
    from . import compile_check
    from .programs import all_programs

    faults = []
    for program in all_programs():
        if only not in program.name:
            continue
        for found in compile_check.check(program, dump):
            if isinstance(found, str):
                faults.append(f"{program.name}: {found}")
                continue
            _say(
                f"{program.name:44} {found.name:28} {found.registers:4} registers"
                f" {found.spill_bytes:5} spilled {found.shared_bytes:7} shared bytes"
            )
    return faults


def bench_kernels() -> int:
    """Times every kernel beside XLA and writes JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description="Times kernels beside XLA.")
    parser.add_argument("--only", default="", help="part of a program's name")
    parser.add_argument("--timer", choices=["cupti", "wall"], default="cupti")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    arguments = parser.parse_args()

    from . import benchmarking
    from .programs import all_programs

    results = []
    for program in all_programs():
        if arguments.only not in program.name:
            continue
        result = benchmarking.measure(program, arguments.timer)
        results.append(dataclasses.asdict(result))
        _say(
            f"{result.program:44} {result.ms:8.4f} ms"
            f" {result.gigabytes_per_second:6.0f} GB/s"
            f" {result.share_of_copy_rate:5.0%} of the copy rate"
            f" {result.speedup:5.2f}x {result.baseline}"
            f" error {result.relative_error:.1e}"
            f" ({result.baseline_relative_error:.1e})"
        )
    report = _origin() | {"timer": arguments.timer, "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _origin() -> dict[str, str]:
    """Returns what the numbers were measured with."""
    import jax

    device = jax.devices()[0]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "backend": device.client.platform_version,
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(sys.argv),
    }


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
