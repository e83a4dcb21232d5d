"""What this machine and this installation are, and whether every op is right here."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import fastjax
from conversions.hf.families import FAMILIES
from fastjax import files, nvidia, requirements, runtime
from fastjax.errors import EnvironmentFault
from fastjax.files import binary_size
from fastjax.models.registry import PRESETS
from fastjax.terminal import as_html
from kernels import self_check
from kernels.self_check import OpCheck

_SCARCE_DISK_BYTES = 2 * 2**30
_BUSY_SHARE = 0.5
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What `fastjax doctor` found; prints itself with rich.

    Attributes:
      versions: Package to version.
      machine: Name to value: system, CPUs, memory, disks.
      gpus: Those that the driver lists, used by JAX or not.
      device: What JAX computes on.
      models: Families and presets, in a few words.
      implementations: Op to what runs it by default at the sizes of Llama-3-8B.
      checks: Of each implementation that can run here, on a small tile.
      problems: What is wrong; each says how to mend it.
      notes: What is worth knowing and no fault.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    gpus: tuple[nvidia.InstalledGpu, ...]
    device: str
    models: str
    implementations: dict[str, str]
    checks: tuple[OpCheck, ...]
    problems: tuple[EnvironmentFault, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns all of it, as JSON holds it."""
        return {
            "versions": self.versions,
            "machine": self.machine,
            "gpus": [dataclasses.asdict(gpu) for gpu in self.gpus],
            "device": self.device,
            "models": self.models,
            "implementations": self.implementations,
            "checks": [
                {**dataclasses.asdict(check), "is_right": check.is_right}
                for check in self.checks
            ],
            "problems": [
                {"code": p.code, "what": p.what, "where": p.where, "fix": p.fix}
                for p in self.problems
            ],
            "notes": list(self.notes),
        }

    def __rich__(self) -> RenderableType:
        """Returns the facts, a line an op, and the notes."""
        facts = Table(show_header=False, box=None)
        for name, value in {**self.versions, **self.machine}.items():
            facts.add_row(name, value)
        for gpu in self.gpus:
            facts.add_row("GPU", _shown_gpu(gpu))
        facts.add_row("JAX computes on", self.device)
        facts.add_row("models", self.models)
        notes = [Text(f"note: {note}") for note in self.notes]
        return Group(facts, Text(), self._ops(), *notes)

    def _repr_html_(self) -> str:
        """Returns the same for notebooks."""
        return as_html(self)

    def _ops(self) -> Table:
        table = Table(box=None)
        for heading in ("op", "runs (Llama-3-8B)", "relative error on a small tile"):
            table.add_column(heading)
        for op, chosen in self.implementations.items():
            errors = [
                f"{c.implementation} {c.error:.0e}{'' if c.is_right else ' WRONG'}"
                for c in self.checks
                if c.op == op
            ]
            table.add_row(op, chosen, ", ".join(errors))
        return table


def diagnose() -> Diagnosis:
    """Looks at the machine and the installation, and runs every op once.

    Takes seconds; on a GPU it also compiles each kernel.
    """
    runtime.configure()
    gpus = nvidia.installed_gpus()
    problems = [*requirements.faults(), *_disk_problems()]
    device, notes = _device(gpus, problems)
    checks = tuple(self_check.check_ops())
    problems += [_wrong(check) for check in checks if not check.is_right]
    families = ", ".join(sorted(FAMILIES))
    return Diagnosis(
        versions=_versions(),
        machine=_machine(),
        gpus=gpus,
        device=device,
        models=f"{families}; {len(PRESETS)} presets, see `fastjax models`",
        implementations=self_check.chosen_for_llama3_8b(),
        checks=checks,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _versions() -> dict[str, str]:
    return {
        "fastjax": fastjax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        **nvidia.cuda_plugins(),
    }


def _machine() -> dict[str, str]:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(f"SC_{kind}_PAGES") * page for kind in ("AVPHYS", "PHYS"))
    return {
        "system": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "memory": f"{binary_size(free)} of {binary_size(total)} free",
        **{
            f"disk of {what}": f"{binary_size(files.free_bytes(path))} free, {path}"
            for what, path in _disks().items()
        },
    }


def _disks() -> dict[str, Path]:
    return {"this folder": Path.cwd(), "the cache": runtime.cache_folder()}


def _device(
    gpus: tuple[nvidia.InstalledGpu, ...], problems: list[EnvironmentFault]
) -> tuple[str, list[str]]:
    """Returns what JAX computes on, and notes; adds to the problems."""
    found = jax.devices()[0]
    if found.platform != "cpu":
        notes = [
            f"{binary_size(gpu.total_bytes - gpu.free_bytes)} of {gpu.name} are in "
            "use: --memory_gib keeps a run within the rest"
            for gpu in gpus
            if gpu.free_bytes < _BUSY_SHARE * gpu.total_bytes
        ]
        return f"{found.device_kind} ({len(jax.devices())} devices)", notes
    if os.environ.get("JAX_PLATFORMS"):
        return "CPU, as JAX_PLATFORMS says", []
    if gpus:
        problems.append(nvidia.why_not_used(gpus))
        return "CPU", []
    return "CPU", ["there is no NVIDIA GPU: training works, slowly"]


def _disk_problems() -> Iterator[EnvironmentFault]:
    for what, path in _disks().items():
        free = files.free_bytes(path)
        if free < _SCARCE_DISK_BYTES:
            yield EnvironmentFault(
                f"the disk of {what} has {binary_size(free)} left",
                where=str(path),
                fix="free some space: a checkpoint of an adapter takes up to 1 GiB",
                code="FJ-ENV-DISK",
            )


def _wrong(check: OpCheck) -> EnvironmentFault:
    return EnvironmentFault(
        f"{check.op} computes wrong numbers here: relative error {check.error:.1e}, "
        f"rounding explains {check.bound:.1e}",
        where=f"implementation {check.implementation}",
        fix=f"run with --implementation {check.op}=reference, and report this",
        code="FJ-ENV-KERNEL",
    )


def _shown_gpu(gpu: nvidia.InstalledGpu) -> str:
    return (
        f"{gpu.name}, compute {gpu.compute_capability or 'unknown'}, "
        f"driver {gpu.driver}, {binary_size(gpu.free_bytes)} of "
        f"{binary_size(gpu.total_bytes)} free"
    )
