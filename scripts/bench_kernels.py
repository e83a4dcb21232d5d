"""Times every kernel beside XLA on this GPU and writes the table as JSON."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax

from kernels import benchmarking
from kernels.programs import all_programs


def main(only: str, timer: benchmarking.Timer, output: Path) -> None:
    """Prints a line for each program and writes all of them to `output`."""
    results = []
    for program in all_programs():
        if only not in program.name:
            continue
        result = benchmarking.measure(program, timer)
        results.append(dataclasses.asdict(result))
        print(
            f"{result.program:44} {result.ms:8.4f} ms"
            f" {result.gigabytes_per_second:6.0f} GB/s"
            f" {result.share_of_copy_rate:5.0%} of the copy rate"
            f" {result.speedup:5.2f}x {result.baseline}"
            f" error {result.relative_error:.1e}"
            f" ({result.baseline_relative_error:.1e})",
            flush=True,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_origin(timer) | {"results": results}, indent=2))


def _origin(timer: str) -> dict[str, str]:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "backend": jax.devices()[0].client.platform_version,
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(sys.argv),
        "timer": timer,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a program's name")
    parser.add_argument("--timer", choices=["cupti", "wall"], default="cupti")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/kernels.json")
    )
    arguments = parser.parse_args()
    main(arguments.only, arguments.timer, arguments.output)
