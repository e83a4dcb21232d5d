"""GPU operations on arrays; import from the op: `from kernels.rope import rope`."""
