"""The NVIDIA GPUs of the machine, as their driver tells, and whether JAX uses them."""

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator

from fastjax.errors import ConfigError, EnvironmentFault
from fastjax.requirements import install_command

_QUERY = "name,driver_version,compute_cap,memory.total,memory.free,uuid"
_TIMEOUT_SECONDS = 20
_SAMPLE_MILLISECONDS = 20
_CUDA_13_DRIVER = 580
_CUDA_12_DRIVER = 525
_NO_GPU = ("", "-1", "NoDevFiles")
_MEBIBYTE, _GIBIBYTE = 2**20, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstalledGpu:
    """A GPU as `nvidia-smi` lists it.

    Attributes:
      driver: Version of the kernel driver, such as "580.65.06".
      compute_capability: Such as "9.0"; empty where the driver is too old to tell.
      free_bytes: Not held by any process, this one included.
      uuid: Such as "GPU-0a1b...", which is the same in every container.
    """

    name: str
    driver: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    uuid: str


def installed_gpus() -> tuple[InstalledGpu, ...]:
    """Returns the GPUs; none where there is no `nvidia-smi` or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return tuple(_gpu(row) for row in rows if len(row) == len(_QUERY.split(",")))


@contextlib.contextmanager
def sampled_load() -> Iterator[dict[str, float]]:
    """Fills a dictionary with the median watts and megahertz of the GPU that runs use.

    They are there after the block, and stay away without `nvidia-smi`, or where it does
    not list that GPU. Products run at the clock that the power limit leaves, so a speed
    without them says little.
    """
    found: dict[str, float] = {}
    program, gpu = shutil.which("nvidia-smi"), _first_visible(installed_gpus())
    if program is None or gpu is None:
        yield found
        return
    query = ["--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]
    command = [program, f"--id={gpu.uuid}", *query, f"--loop-ms={_SAMPLE_MILLISECONDS}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        process.terminate()
        rows = [line.split(", ") for line in process.communicate()[0].splitlines()]
        rows = [row for row in rows if len(row) == 2 and all(map(_is_number, row))]
        if rows:
            found["watts"] = statistics.median(float(row[0]) for row in rows)
            found["sm_megahertz"] = statistics.median(float(row[1]) for row in rows)


def _gpu(row: list[str]) -> InstalledGpu:
    name, driver, capability, total, free, uuid = row
    return InstalledGpu(
        name=name,
        driver=driver,
        compute_capability=capability if capability[:1].isdigit() else "",
        total_bytes=_mebibytes(total),
        free_bytes=_mebibytes(free),
        uuid=uuid,
    )


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _mebibytes(text: str) -> int:
    return int(text) * _MEBIBYTE if text.isdigit() else 0


def memory_share(memory_gib: float | int) -> float | None:
    """Returns the share of the memory of the GPU that runs use that so many GiB are.

    That is the first one of `CUDA_VISIBLE_DEVICES`. None where 0 GiB leave it to JAX,
    or where there is no GPU.

    Raises:
      ConfigError: The GPU has less, or the driver does not list it.
    """
    gpus = installed_gpus() if memory_gib > 0 else ()
    gpu, asked = _first_visible(gpus), _asked_gpu()
    if gpus and gpu is None and asked not in _NO_GPU:
        raise ConfigError(
            f"{memory_gib=:g} is of a GPU whose memory is not known",
            where=f"CUDA_VISIBLE_DEVICES names {asked!r}, and nvidia-smi lists no such "
            "GPU",
            fix="name a whole GPU by its index or UUID, or drop memory_gib",
        )
    if gpu is None or not gpu.total_bytes:
        return None
    share = memory_gib * _GIBIBYTE / gpu.total_bytes
    if share > 1:
        raise ConfigError(
            f"{memory_gib=:g} is more than the GPU has, "
            f"{gpu.total_bytes / _GIBIBYTE:.1f}",
            fix="leave some for the driver: 90 % of it at most",
        )
    return share


def _first_visible(gpus: tuple[InstalledGpu, ...]) -> InstalledGpu | None:
    """Returns the GPU that CUDA counts as its first; None where it sees none."""
    first = _asked_gpu()
    if first.isdecimal():
        return gpus[int(first)] if int(first) < len(gpus) else None
    named = [gpu for gpu in gpus if first and gpu.uuid.startswith(first)]
    return named[0] if named else None


def _asked_gpu() -> str:
    """Returns the first name or index of `CUDA_VISIBLE_DEVICES`, "0" without it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()


def cuda_plugins() -> dict[str, str]:
    """Returns the versions of JAX's installed CUDA plugins by name."""
    names = ("jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_not_used(gpus: tuple[InstalledGpu, ...]) -> EnvironmentFault:
    """Returns the error for GPUs that JAX does not see, with the line that mends it."""
    gpu = gpus[0]
    major = gpu.driver.partition(".")[0]
    version = int(major) if major.isdigit() else 0
    extra = "cuda13" if version >= _CUDA_13_DRIVER else "cuda12"
    fix = install_command(extra)
    what = (
        "there is a GPU, and JAX cannot use it: this environment has JAX without CUDA, "
        f"the extra {extra} is missing"
    )
    plugins = cuda_plugins()
    if version < _CUDA_12_DRIVER:
        what = f"the driver {gpu.driver} is too old for CUDA 12"
        fix = f"install a driver of version {_CUDA_12_DRIVER} or newer, then {fix}"
    elif plugins:
        shown = ", ".join(f"{name} {version}" for name, version in plugins.items())
        what = f"JAX cannot start its CUDA plugin ({shown})"
        fix = f"{fix} in a fresh environment; the log of JAX above says why"
    return EnvironmentFault(
        what,
        where=f"{gpu.name}, driver {gpu.driver}",
        fix=f"{fix}; or set JAX_PLATFORMS=cpu to run without it",
        code="FJ-ENV-GPU",
    )


def require_gpu_in_use() -> None:
    """Raises unless JAX uses the machine's GPU, has none, or was told not to.

    A run on the CPU beside an idle GPU is nobody's wish, and looks like a hang.

    Raises:
      EnvironmentFault: A GPU is there and JAX sees none; says what to install.
    """
    import jax

    if os.environ.get("JAX_PLATFORMS") or jax.default_backend() != "cpu":
        return
    gpus = installed_gpus()
    if gpus:
        raise why_not_used(gpus)
