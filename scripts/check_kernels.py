"""Compiles every kernel for Hopper without a GPU; fails on spills and the like."""

from kernels.command_line import check_kernels

if __name__ == "__main__":
    raise SystemExit(check_kernels())
