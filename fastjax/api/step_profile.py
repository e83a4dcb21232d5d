"""Where the time of one training step goes, by kind of kernel.

The step is compiled twice. CUDA graphs hide from the profiler which instruction a
kernel belongs to, so the kernels are those of a program without graphs; the wall time,
and so the gaps, are those of the step as training runs it.
"""

import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from fastjax import runtime
from fastjax.api.benchmark_report import environment, gib, write_json
from fastjax.api.random_step import RandomStep, StepArgs, planner_of
from fastjax.api.remat_auto import planned_remat
from fastjax.nvidia import sampled_load
from fastjax.train.compiled import device_bytes

_WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
_WARM_UP_STEPS = 3
_TIMED_STEPS = 10
_SKINNY = 256
_SCOPES = {
    "cross_entropy": "loss",
    "attention": "attention",
    "rms_norm": "norm",
    "rope": "rope",
    "gated_mlp": "activation",
    "nf4": "dequantise",
    "lora_matmul": "matmul",
    "optimizer": "optimiser",
}
"""Name scope to kind of work; the innermost scope of an instruction decides."""

_INSTRUCTION = re.compile(r"%?([\w.\-]+) = \(?\w+\[([\d,]*)\].*")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|matmul|products", re.IGNORECASE)
_LOW_RANK = "low_rank"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileArgs(StepArgs):
    """Times one QLoRA step of a preset by kind of kernel, on random weights.

    Attributes:
      kernels: Kernels that take most time, listed one by one.
      out: JSON file that is written; None writes none.
    """

    kernels: int = 20
    out: str | None = None


class Kernel(NamedTuple):
    """One launch on the device.

    Attributes:
      name: Of the kernel or of the copy.
      instruction: Of the compiled program; empty when unknown.
      start_ns: On the device's clock.
      duration_ns: Of the launch.
    """

    name: str
    instruction: str
    start_ns: float
    duration_ns: float


class Instruction(NamedTuple):
    """What the compiled program says of one of its instructions.

    Attributes:
      sizes: Axes of its first result.
      source: Path of the name scopes that it comes from.
    """

    sizes: tuple[int, ...]
    source: str


def run_profile(args: ProfileArgs) -> dict[str, Any]:
    """Returns, and writes, the milliseconds of one warm step by kind of kernel."""
    runtime.configure()
    planner = planner_of(args)
    remat, _ = planned_remat(planner)
    make = functools.partial(
        RandomStep,
        planner.config,
        planner.spec,
        remat,
        planner.shape,
    )
    wall, load, implementations = _wall_milliseconds(make())
    step = make(compiler_options=_WITHOUT_GRAPHS)
    # The clock falls in the first second of work, to what the power limit leaves.
    for seed in range(_WARM_UP_STEPS + _TIMED_STEPS):
        step(seed)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step(1)
        kernels = list(recorded_kernels(Path(folder)))
    program = instructions(step.compiled.program_text())
    result = {
        **dataclasses.asdict(args),
        "remat_plan": str(remat),
        "step_milliseconds": wall,
        **summary(kernels, program, wall, args.kernels),
        "peak_gib": gib(device_bytes("peak_bytes_in_use")),
        "load": load,
        "implementations": implementations,
        **environment(),
    }
    write_json(args.out, result)
    return result


def _wall_milliseconds(
    step: RandomStep,
) -> tuple[float, dict[str, float], dict[str, list[str]]]:
    """Returns the median time of a step as training runs it, load and choices."""
    seconds = []

    def run(seed: int) -> None:
        start = time.perf_counter()
        step(seed)
        seconds.append(time.perf_counter() - start)

    for seed in range(_WARM_UP_STEPS):
        run(seed)
    with sampled_load() as load:
        for seed in range(_TIMED_STEPS):
            run(seed)
    median = statistics.median(seconds[_WARM_UP_STEPS:])
    return median * 1e3, load, step.compiled.implementations


def recorded_kernels(folder: Path) -> Iterator[Kernel]:
    """Yields every launch on the first GPU in a folder that the profiler wrote."""
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU:0"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    name = str(stats.get("hlo_op", ""))
                    yield Kernel(event.name, name, event.start_ns, event.duration_ns)


def instructions(program: str) -> dict[str, Instruction]:
    """Returns the instructions of a compiled program's text, by name."""
    found = {}
    for line in program.splitlines():
        match = _INSTRUCTION.match(line.strip().removeprefix("ROOT "))
        if match is None:
            continue
        sizes = tuple(int(size) for size in match[2].split(",") if size)
        source = _SOURCE.search(line)
        found[match[1]] = Instruction(sizes, source[1] if source else "")
    return found


def summary(
    kernels: Iterable[Kernel],
    program: dict[str, Instruction],
    wall_milliseconds: float,
    listed: int,
) -> dict[str, Any]:
    """Returns milliseconds by kind, those of the busiest kernels, and the gaps.

    Copies to and from the host run beside the kernels: they are told apart and are no
    part of the busy time. A gap is wall time in which no kernel ran.
    """
    kernels = list(kernels)
    kinds: dict[str, float] = defaultdict(float)
    names: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        instruction = program.get(kernel.instruction)
        kind = kind_of(kernel, instruction)
        kinds[kind] += kernel.duration_ns / 1e6
        source = instruction.source if instruction else ""
        names[kind, kernel.name, source].append(kernel.duration_ns / 1e6)
    on_device = [k for k in kernels if not is_host_copy(k.name)]
    busy = covered_ns((k.start_ns, k.start_ns + k.duration_ns) for k in on_device) / 1e6
    busiest = sorted(names.items(), key=lambda item: -sum(item[1]))[:listed]
    return {
        "milliseconds_by_kind": {
            **dict(sorted(kinds.items(), key=lambda item: -item[1])),
            "gaps": wall_milliseconds - busy,
        },
        "busy_milliseconds": busy,
        "busiest": [
            {
                "kind": kind,
                "kernel": name,
                "source": source,
                "launches": len(times),
                "milliseconds": sum(times),
            }
            for (kind, name, source), times in busiest
        ],
    }


def kind_of(kernel: Kernel, instruction: Instruction | None) -> str:
    """Returns the kind of work of one launch."""
    lowered = kernel.name.lower()
    if lowered.startswith(("memcpy", "memset")):
        return "host copies" if is_host_copy(kernel.name) else "copies"
    source = "" if instruction is None else instruction.source
    places = {source.rfind(scope): kind for scope, kind in _SCOPES.items()}
    innermost = max(places)
    kind = places[innermost] if innermost >= 0 else "other"
    if kind != "matmul":
        return kind
    if _LOW_RANK in lowered:
        return "adapter matmul"
    if _GEMM.search(kernel.name) is None:
        return "around matmul"
    sizes = () if instruction is None else instruction.sizes[:2]
    return "adapter matmul" if sizes and min(sizes) <= _SKINNY else "matmul"


def is_host_copy(name: str) -> bool:
    """Whether a launch of that name moves bytes between host and device."""
    return name.lower().startswith("memcpy") and ("H2D" in name or "D2H" in name)


def covered_ns(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
