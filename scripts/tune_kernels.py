"""Measures on this GPU which implementation of each op is the default for a case."""

from kernels.command_line import tune_kernels

if __name__ == "__main__":
    raise SystemExit(tune_kernels())
