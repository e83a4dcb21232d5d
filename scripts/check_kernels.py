"""Compiles every kernel for Hopper without a GPU; fails on spills and the like."""

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main(only: str, dump: Path) -> int:
    """Prints a line for each kernel; returns the exit status."""
    from kernels import compile_check
    from kernels.programs import all_programs

    faults = []
    for program in all_programs():
        if only not in program.name:
            continue
        for found in compile_check.check(program, dump):
            if isinstance(found, str):
                faults.append(f"{program.name}: {found}")
                continue
            print(
                f"{program.name:44} {found.name:28} {found.registers:4} registers"
                f" {found.spill_bytes:5} spilled {found.shared_bytes:7} shared bytes",
                flush=True,
            )
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a program's name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read while jax is imported, which is why that happens in `main`.
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ.update(
            JAX_PLATFORMS="cpu",
            JAX_ENABLE_COMPILATION_CACHE="false",
            MOSAIC_GPU_DUMP_PTXAS="1",
        )
        raise SystemExit(main(arguments.only, Path(folder)))
