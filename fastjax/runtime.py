"""Process-wide settings, made once before the first use of a device."""

import functools
import os
from pathlib import Path

# Latency hiding and command buffers are XLA's defaults; these were chosen by
# measurement and are added to what the user has set.
_XLA_GPU_FLAGS: tuple[str, ...] = ()
_DETERMINISM = "--xla_gpu_exclude_nondeterministic_ops=true"


def cache_folder() -> Path:
    """Returns fastjax's cache folder: `FASTJAX_CACHE`, or one in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTJAX_CACHE") or Path(base) / "fastjax")


@functools.cache
def configure(*, full_determinism: bool = False) -> None:
    """Sets XLA flags and the compilation cache; later calls do nothing.

    The cache stays off when its folder cannot be written, as on a read-only home.

    Args:
      full_determinism: GPU programs give the same bits run after run. Must be asked
        for before the first use of a device.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    wanted = (*_XLA_GPU_FLAGS, *((_DETERMINISM,) if full_determinism else ()))
    os.environ["XLA_FLAGS"] = " ".join([*wanted, *flags])
    # Transformers is used for tokenizers alone; it need not say that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def is_deterministic() -> bool:
    """Whether the same program gives the same bits run after run on this device."""
    import jax

    return jax.default_backend() == "cpu" or (
        _DETERMINISM in os.environ.get("XLA_FLAGS", "")
    )
