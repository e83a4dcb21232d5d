"""Process-wide settings, made once before the first use of a device."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

from fastjax.errors import ConfigError, printable

GPUUse = Literal["share", "as needed", "none"]
"""Memory of the GPU: a share of it from the start, what is needed, or no GPU."""

_PREALLOCATION = "XLA_PYTHON_CLIENT_PREALLOCATE"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_HOST_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_HOST_SHARE = 0.8
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
_CACHED_SECONDS = 0.2
"""Of compilation: a start on a GPU has dozens of programs that take about as long."""
_SWITCH_SECONDS = 0.0005
_DETERMINISM = "--xla_gpu_exclude_nondeterministic_ops=true"


def cache_folder() -> Path:
    """Returns fastjax's cache folder: `FASTJAX_CACHE`, or one in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTJAX_CACHE") or Path(base) / "fastjax")


def configure(
    *,
    full_determinism: bool = False,
    memory_share: float | None = None,
    gpu: GPUUse = "share",
) -> None:
    """Sets XLA flags and the compilation cache; the first call decides.

    The cache stays off when its folder cannot be written, as on a read-only home.

    Args:
      full_determinism: GPU programs give the same bits run after run. A later call
        cannot ask for it any more: see `is_deterministic`.
      memory_share: Most of each GPU's memory that this process takes, from 0 to 1; None
        leaves it to JAX. What the environment says wins.
      gpu: Commands that do not train leave to other work what they do not need.
    """
    settled = _settled()
    if "capped" in settled:
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    if full_determinism and _DETERMINISM not in flags:
        flags.append(_DETERMINISM)
        os.environ["XLA_FLAGS"] = " ".join(flags)
    if memory_share is not None and not any(map(os.environ.get, _MEMORY_VARIABLES)):
        os.environ[_MEMORY_VARIABLES[0]] = f"{memory_share:.4f}"
    if gpu == "as needed":
        os.environ.setdefault(_PREALLOCATION, "false")
    settled["full_determinism"] = _DETERMINISM in flags
    settled["capped"] = any(map(os.environ.get, _MEMORY_VARIABLES))
    if not os.environ.get(_HOST_VARIABLE):
        os.environ[_HOST_VARIABLE] = str(max(1, usable_host_bytes() // 2**30))
    # Transformers is used for tokenizers alone; it need not say that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    if gpu == "none":
        jax.config.update("jax_platforms", "cpu")
    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_SECONDS)


def step_compiler_options(remat: Collection[str]) -> dict[str, str]:
    """Returns the options that XLA compiles the training step with.

    Measured on an H200 with Llama-3-8B: CUDA graphs save 1 to 2 % of a step, but copies
    to the host do not run beside the kernels of a graph, which costs 8 %. The latency
    hiding scheduler, double-buffered loops, dynamic slice fusion, and matrix products
    without Triton gain nothing or lose, so XLA's defaults stay.

    Args:
      remat: Policies of the layers.
    """
    is_offloading = any("offload" in policy for policy in remat)
    return {"xla_gpu_enable_command_buffer": ""} if is_offloading else {}


def wake_device() -> None:
    """Begins to start the device, which takes seconds on a GPU; its first user waits.

    After `configure`. What goes wrong that user will be told.
    """
    import jax

    def wake() -> None:
        with contextlib.suppress(RuntimeError):
            jax.devices()

    threading.Thread(target=wake, name="wake-device").start()


def own_process() -> None:
    """Says that nobody but fastjax runs in this process, and sets Python up for it.

    As on the command line. Threads take turns ten times as often: the one that lowers
    the step otherwise keeps the interpreter for 5 ms whenever the one that loads
    weights wants it. On two cores, without a GPU, 291 tensors of 1 MB beside it took
    10 s, and take 2, while the lowering takes no longer.

    An interrupt is noted, for `require_no_interrupt`.
    """
    _settled()["own"] = True
    sys.setswitchinterval(_SWITCH_SECONDS)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _settled()["interrupted"] = True
    raise KeyboardInterrupt


def require_no_interrupt() -> None:
    """Raises KeyboardInterrupt if one came before and was lost.

    Python drops what is raised while it calls back, when it collects garbage for one.
    """
    if _settled().get("interrupted"):
        raise KeyboardInterrupt


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Keeps what is imported inside from importing PyTorch.

    Transformers would, for tokenizers too, and that takes ten seconds. It then takes
    PyTorch for missing as long as the process lives, so that one must be our own.
    """
    if not _settled().get("own") or "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def host_limit_bytes() -> int:
    """Returns how much pinned host memory XLA may take.

    Raises:
      ConfigError: The variable that says so holds no number.
    """
    given = os.environ.get(_HOST_VARIABLE)
    if not given:
        return usable_host_bytes()
    if not given.isdecimal():
        raise ConfigError(
            f"{_HOST_VARIABLE}={printable(given)} is no whole number of GiB",
            fix="correct it, or leave it out",
        )
    return min(int(given) * 2**30, host_memory_bytes())


def usable_host_bytes() -> int:
    """Returns what a run may take of the machine's memory; other programs need some."""
    return int(_HOST_SHARE * host_memory_bytes())


@functools.cache
def host_memory_bytes() -> int:
    """Returns the memory of the machine, or of the container where that has less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # none there, or "max"
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found)


def is_deterministic() -> bool:
    """Whether the same program gives the same bits run after run on this device."""
    import jax

    return jax.default_backend() == "cpu" or _settled().get("full_determinism", False)


def is_capped() -> bool:
    """Whether JAX started with a share of the memory, ours or the environment's."""
    return _settled().get("capped", False)


@functools.cache
def _settled() -> dict[str, bool]:
    """Returns what `configure` and `own_process` have set; empty before them."""
    return {}
