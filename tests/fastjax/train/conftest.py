"""The tiny job, for every test of training, compiled once."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

TINY_RUN = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The names of tiny_run.py."""
    return SimpleNamespace(**runpy.run_path(str(TINY_RUN)), path=TINY_RUN)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds compiled steps, so that many runs of one job compile once."""
    return tmp_path_factory.mktemp("xla_cache")


@pytest.fixture(autouse=True)
def compiled_once(cache_dir: Path) -> Iterator[None]:
    """Uses that folder while a test of training runs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache_dir), 0.2), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
