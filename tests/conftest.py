"""Test settings: CPU unless told otherwise, strict dtypes and ranks."""

import contextlib
import os
import signal

# Shells let what runs behind them ignore it, and its children with it: runs that tests
# interrupt would go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Interpreted kernels block a thread of XLA's pool for each warpgroup that waits.
os.environ.setdefault("NPROC", "16")
# XLA spends most of the tests' time: on CPUs they take its quick code generator, which
# makes no context of MLIR for each of the thousand fusions of an interpreted kernel.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    quick = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Random inputs; `--hypothesis-profile thorough` draws many. Tests of kernels on a GPU
# need no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("quick", max_examples=200, deadline=None)
    settings.register_profile("thorough", max_examples=10_000, deadline=None)
    settings.load_profile("quick")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` without one, `gpu(HOPPER)` on any of another kind."""
    wanted = [marker.args for marker in item.iter_markers("gpu")]
    if not wanted:
        return
    from kernels.device import compute_capability  # not before it is instrumented

    found = compute_capability()
    if found is None:
        pytest.skip("needs a CUDA GPU")
    for (capability,) in filter(None, wanted):
        if capability != found:
            pytest.skip(f"needs a GPU of compute {capability}; found {found}")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of checkpoints and numbers made with the reference libraries."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compiles as for users: only then does LLVM fuse products with sums."""
    is_quick = jax.config.read("jax_disable_most_optimizations")
    if is_quick:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", is_quick)
