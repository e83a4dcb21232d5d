"""What `scripts/{check,bench,tune,profile}_kernels.py` run.

The modules that need jax are imported inside the commands, so that `--help` is quick.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking import Result
    from .program import Program

_RESULTS = Path("benchmarks/results")


def check_kernels() -> int:
    """Compiles every kernel for Hopper without a GPU; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compiles kernels without a GPU.")
    _add_only(parser)
    only = parser.parse_args().only
    folder = os.environ.get("MOSAIC_GPU_DUMP_TO")
    if not folder or not os.environ.get("MOSAIC_GPU_DUMP_PTXAS"):
        sys.stderr.write("run `make check-kernels`, which sets MOSAIC_GPU_DUMP_TO\n")
        return 2
    faults = _check(only, Path(folder))
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    return 1 if faults else 0


def _check(only: list[str], dump: Path) -> list[str]:
    from . import compile_check

    faults = []
    for program in _programs(only):
        if not program.kernels:
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
    """Times every op beside XLA and writes JSON; returns the exit status."""
    parser = _timing_parser("Times every op and kernel beside XLA.")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/...")
    help_ = "compare products with their rivals alone, for so long without a pause"
    parser.add_argument("--sustained", type=float, metavar="SECONDS", help=help_)
    arguments = parser.parse_args()
    if arguments.sustained is not None:
        if arguments.sustained <= 0:
            parser.error(f"--sustained {arguments.sustained:g} must be above 0 seconds")
        if arguments.timer != "cupti":
            parser.error("--sustained times with cupti alone; leave --timer out")
        return _compare_rivals(arguments)

    from . import benchmarking, results

    ceilings = benchmarking.ceilings(arguments.timer)
    _say(
        f"ceilings: copy {ceilings.copy_bytes_per_second / 1e12:.2f} TB/s,"
        f" matmul {ceilings.matmul_flops_per_second / 1e12:.0f} TFLOP/s"
    )
    header, origin = _header(), _origin(arguments.timer)
    output = arguments.output or _results(header["device"]) / "kernels.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for program in _programs(arguments.only):
        rows = []
        for result in benchmarking.measure(program, ceilings, arguments.timer):
            rows.append(dataclasses.asdict(result) | origin)
            _say(_row(result))
        # At once: a run that is cut short keeps what it has measured.
        results.write_results(output, header, rows)
    return 0


def _compare_rivals(arguments: argparse.Namespace) -> int:
    """Writes how products stand beside their rivals; returns the exit status."""
    from . import results, rivals

    header, origin = _header(), _origin("cupti")
    output = arguments.output or _results(header["device"]) / "rivals.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    programs = [program for program in _programs(arguments.only) if program.rival]
    for found in rivals.compare(programs, arguments.sustained):
        row = dataclasses.asdict(found) | origin
        results.write_results(output, header, [row])
        _say(
            f"{found.program:32} {found.ms:8.4f} ms {found.share_of_rival:6.1%} of"
            f" {found.rival}, sustained {found.sustained_ms:8.4f} ms"
            f" {found.sustained_share_of_rival:6.1%}"
        )
    return 0


def profile_kernels() -> int:
    """Writes what ncu counts of the kernels that matter; returns the exit status."""
    parser = argparse.ArgumentParser(description="Profiles kernels with ncu.")
    _add_only(parser)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/...")
    help_ = "run the programs for a profiler: what ncu is told to call"
    parser.add_argument("--launch", action="store_true", help=help_)
    arguments = parser.parse_args()

    from . import profiling, results

    names = [n for n in profiling.PROFILED if any(map(n.__contains__, arguments.only))]
    if arguments.launch:
        programs = {program.name: program for program in _programs(names)}
        profiling.launch(programs[name] for name in names)
        return 0
    found = profiling.profile([sys.executable, *sys.argv, "--launch"])
    header, origin = _header(), _origin("ncu")
    output = arguments.output or _results(header["device"]) / "ncu.json"
    rows = [
        {"program": name, "kernels": kernels} | origin
        for name, kernels in zip(names, found, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    results.write_results(output, header, rows)
    return 0


def tune_kernels() -> int:
    """Times what defaults are chosen by and writes this device's table."""
    parser = _timing_parser("Measures which implementation is the fastest on this GPU.")
    parser.add_argument("--output", type=Path, help="default: kernels/tuned/...")
    arguments = parser.parse_args()

    from . import benchmarking, choice, device, results

    header, origin = _header(), _origin(arguments.timer)
    header["compute_capability"] = device.compute_capability()
    output = arguments.output or choice.FOLDER / choice.table_name(header["device"])
    for timed in benchmarking.choices(_programs(arguments.only), arguments.timer):
        results.write_table(output, header, [timed | origin])
        _say(json.dumps(timed))
    return 0


def _timing_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    _add_only(parser)
    parser.add_argument("--timer", choices=["cupti", "wall"], default="cupti")
    return parser


def _add_only(parser: argparse.ArgumentParser) -> None:
    help_ = "parts of programs' names; a program with one of them is run"
    parser.add_argument("--only", nargs="+", default=[""], help=help_)


def _programs(only: list[str]) -> Iterator["Program"]:
    from .programs import all_programs

    for program in all_programs():
        if any(part in program.name for part in only):
            yield program


def _results(device: str) -> Path:
    return _RESULTS / device.lower().replace(" ", "-")


def _row(result: "Result") -> str:
    return (
        f"{result.program:44} {result.implementation:12} {result.ms:9.4f} ms"
        f" {result.gigabytes_per_second:6.0f} GB/s"
        f" {result.teraflops_per_second:5.0f} TFLOP/s"
        f" {result.share_of_ceiling:5.0%} of the ceiling"
        f" {result.speedup:5.2f}x error {result.relative_error:.1e}"
    )


def _header() -> dict[str, Any]:
    """Returns what is the same for all rows of a file."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "command": f"python {sys.argv[0]}",
    }


def _origin(timer: str) -> dict[str, str]:
    """Returns what a row was measured with: a file holds rows of several runs."""
    import jax

    return {
        "jax": jax.__version__,
        "backend": jax.devices()[0].client.platform_version,
        "timer": timer,
        "commit": os.environ.get("GIT_COMMIT") or _commit(),
    }


def _commit() -> str:
    """Returns the checkout's commit; elsewhere GIT_COMMIT may name it."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "unknown"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
