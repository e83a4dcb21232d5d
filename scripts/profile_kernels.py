"""Profiles kernels on this GPU with Nsight Compute and writes the counters as JSON."""

from kernels.command_line import profile_kernels

if __name__ == "__main__":
    raise SystemExit(profile_kernels())
