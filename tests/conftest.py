"""Test settings: CPU unless told otherwise, strict dtypes and ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Interpreted kernels block a thread of XLA's pool for each warpgroup that waits.
os.environ.setdefault("NPROC", "16")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of checkpoints and numbers made with the reference libraries."""
    return Path(__file__).parent / "fixtures"
