"""Compiles the kernels for a GPU that is not here and reads what ptxas says of them.

The whole pipeline runs: Pallas, Mosaic, LLVM, ptxas. It takes JAX's CUDA plugin and
ptxas, no driver. Before jax is imported, MOSAIC_GPU_DUMP_PTXAS=1 and the folder for
the reports, MOSAIC_GPU_DUMP_TO, must stand in the environment. A process can compile
for one architecture only, because the assembler keeps the first one it was given.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from .device import HOPPER, assume_compute_capability
from .program import Program

TARGET = Path(__file__).parent / "tuned" / "nvidia_h200.txtpb"
"""XLA's description of the GPU, written by XLA on one."""

MAX_SHARED_BYTES = 232_448
"""What a block on Hopper may use."""

_SERIALISED_WGMMA = "wgmma.mma_async instructions are serialized"


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """What the compiler says of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    has_serialised_wgmma: bool

    def faults(self) -> list[str]:
        """Returns what must not be, as sentences."""
        faults = []
        if self.spill_bytes:
            faults.append(f"{self.name} spills {self.spill_bytes} bytes of registers")
        if self.shared_bytes > MAX_SHARED_BYTES:
            limit = f"of {MAX_SHARED_BYTES}"
            faults.append(f"{self.name} takes {self.shared_bytes} {limit} shared bytes")
        if self.has_serialised_wgmma:
            faults.append(f"{self.name} has serialised wgmma instructions")
        return faults


def compile_kernels(program: Program, dump: Path) -> list[CompiledKernel]:
    """Compiles `program` for `TARGET` and returns its Mosaic GPU kernels.

    Args:
      program: Compiled with its "mosaic_gpu" implementation.
      dump: The folder that MOSAIC_GPU_DUMP_TO named when the process started; what
        is read is removed.
    """
    run = functools.partial(program.run, implementation="mosaic_gpu")
    with assume_compute_capability(HOPPER):
        shapes = jax.tree.map(_on_target, jax.eval_shape(program.arguments))
        jax.jit(run).lower(*shapes).compile()
    kernels = []
    for report in sorted(dump.glob("*.ptxas")):
        kernels.append(_read(report))
        # The next program's kernels may have the same names; the logs are large.
        for file in dump.glob(f"{report.stem}.*"):
            file.unlink()
    return kernels


def check(program: Program, dump: Path) -> Iterator[CompiledKernel | str]:
    """Yields each kernel of `program`, and a sentence for each fault found."""
    kernels = compile_kernels(program, dump)
    names = {kernel.name for kernel in kernels}
    for kernel in kernels:
        yield kernel
        yield from kernel.faults()
    for name in program.kernels:
        if name not in names:
            yield f"{program.name} does not launch {name}"


def _on_target(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("gpu",))


def _read(report: Path) -> CompiledKernel:
    """Reads one kernel's ptxas report and the resources that Mosaic noted beside it."""
    text = report.read_text()
    stores, loads = _numbers(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    (registers,) = _numbers(r"Used (\d+) registers", text)
    resources = report.with_suffix(".resources.txt").read_text()
    (shared_bytes,) = _numbers(r"smem_scratch_bytes=(\d+)", resources)
    return CompiledKernel(
        name=report.stem.rpartition("_")[0],
        registers=registers,
        spill_bytes=stores + loads,
        shared_bytes=shared_bytes,
        has_serialised_wgmma=_SERIALISED_WGMMA in text,
    )


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in the compiler's report:\n{text}")
    return tuple(map(int, match.groups()))
