"""How a run starts: what is read before it is needed, what is left out."""

import importlib
import sys
import threading
from pathlib import Path

import pytest

from fastjax import runtime
from fastjax.api import reading_ahead, run_plan
from fastjax.api.loading import files_of
from fastjax.api.training import run_training
from fastjax.config import DataConfig, TrainConfig
from fastjax.errors import ConfigError


def test_files_are_read_unless_memory_would_not_hold_them(
    fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fixtures / "tiny_llama3"
    files = files_of(TrainConfig(model=str(folder)))
    assert files == (folder / "model.safetensors",)
    go, stop = threading.Event(), threading.Event()
    stop.set()
    assert reading_ahead.read_ahead(files, go) == files[0].stat().st_size
    assert reading_ahead.read_ahead(files, stop) == 0
    monkeypatch.setattr(reading_ahead, "_MOST_OF_MEMORY", 0.0)
    assert reading_ahead.read_ahead(files, go) == 0


@pytest.mark.parametrize("is_own", [True, False])
def test_torch_is_hidden_in_a_process_of_our_own_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_own: bool
) -> None:
    (tmp_path / "torch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setitem(runtime._settled(), "own", is_own)
    with runtime.without_torch():
        is_hidden = importlib.util.find_spec("torch") is None
    assert is_hidden == is_own
    assert importlib.util.find_spec("torch") is not None


def test_the_first_run_on_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTJAX_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the quick brown fox jumps over the dog"}\n' * 8)
    config = TrainConfig(
        model="tiny",
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        data=DataConfig(dataset_name=str(rows), max_length=64),
    )
    monkeypatch.setattr(run_plan, "_compiles_beside", lambda: True)
    before = threading.enumerate()
    assert run_training(config).step == 1
    assert (tmp_path / "cache" / "random" / "tiny").is_dir()
    assert not [t for t in threading.enumerate() if t not in before and not t.daemon]


@pytest.mark.parametrize(
    ("given", "expected"), [("", 0.8), ("1", None), ("999999", 1.0)]
)
def test_the_host_gives_no_more_than_it_has(
    given: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", given)
    there = runtime.host_memory_bytes()
    share = 2**30 if expected is None else int(expected * there)
    assert runtime.host_limit_bytes() == share


def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "12.5")
    with pytest.raises(ConfigError, match="no whole number"):
        runtime.host_limit_bytes()
