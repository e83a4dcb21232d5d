"""The tiny job, for every test of training, compiled once."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

TINY_RUN = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The names of tiny_run.py."""
    return SimpleNamespace(**runpy.run_path(str(TINY_RUN)), path=TINY_RUN)


@pytest.fixture(autouse=True)
def compiled_steps(compiled_once: None) -> None:
    """Many runs of one job compile once, in every test of training."""
