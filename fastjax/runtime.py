"""Process-wide settings, made once before the first use of a device."""

import functools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

GPUUse = Literal["share", "as needed", "none"]
"""Memory of the GPU: a share of it from the start, what is needed, or no GPU."""

_PREALLOCATION = "XLA_PYTHON_CLIENT_PREALLOCATE"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_CACHED_SECONDS = 0.2
"""Of compilation: a start on a GPU has dozens of programs that take about as long."""
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
    if settled:
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
    return {"xla_gpu_enable_command_buffer": ""} if "offload" in remat else {}


def is_deterministic() -> bool:
    """Whether the same program gives the same bits run after run on this device."""
    import jax

    return jax.default_backend() == "cpu" or _settled().get("full_determinism", False)


def is_capped() -> bool:
    """Whether JAX started with a share of the memory, ours or the environment's."""
    return _settled().get("capped", False)


@functools.cache
def _settled() -> dict[str, bool]:
    """Returns what the first call of `configure` has set; empty before it."""
    return {}
