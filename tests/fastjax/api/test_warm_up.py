"""What a run begins before it needs it."""

import importlib
import sys
from pathlib import Path

import pytest

from fastjax import runtime
from fastjax.api import warm_up
from fastjax.api.loading import files_of
from fastjax.config import TrainConfig


def test_files_are_read_unless_memory_would_not_hold_them(
    fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fixtures / "tiny_llama3"
    files = files_of(TrainConfig(model=str(folder)))
    assert files == (folder / "model.safetensors",)
    assert warm_up.read_ahead(files) == files[0].stat().st_size
    monkeypatch.setattr(warm_up, "_MOST_OF_MEMORY", 0.0)
    assert warm_up.read_ahead(files) == 0


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
