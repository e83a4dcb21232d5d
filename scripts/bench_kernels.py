"""Times every op on this GPU beside XLA and writes the table as JSON."""

from kernels.command_line import bench_kernels

if __name__ == "__main__":
    raise SystemExit(bench_kernels())
