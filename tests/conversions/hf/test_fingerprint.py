"""The fingerprint of a model folder follows its content and nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conversions.hf import folder_fingerprint
from conversions.safetensors_writer import write_safetensors
from fastjax.errors import ModelError

Change = Callable[[Path], object]


@pytest.fixture
def model(fixtures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures / "tiny_llama3_sharded", tmp_path / "model"))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


CHANGES: dict[str, Change] = {
    "config": lambda f: (f / "config.json").write_text("{}"),
    "index": lambda f: (f / "model.safetensors.index.json").write_text(
        (f / "model.safetensors.index.json").read_text() + " "
    ),
    "first shard": lambda f: flip(f / "model-00001-of-00004.safetensors", 131_000),
    "last shard": lambda f: flip(f / "model-00004-of-00004.safetensors", 41_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(model: Path, change: str):
    before = folder_fingerprint(model)
    CHANGES[change](model)
    assert folder_fingerprint(model) != before


def test_other_files_times_and_places_do_not_matter(model: Path, tmp_path: Path):
    before = folder_fingerprint(model)
    (model / "README.md").write_text("x")
    (model / "reference.safetensors").write_text("x")
    for path in model.iterdir():
        os.utime(path, (0, 0))
    moved = model.rename(tmp_path / "elsewhere")
    assert folder_fingerprint(moved) == before


def test_a_large_file_is_sampled_from_end_to_end(fixtures: Path, tmp_path: Path):
    shutil.copyfile(fixtures / "tiny_llama3" / "config.json", tmp_path / "config.json")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": np.zeros((10, 1 << 20), np.uint8)})
    size = path.stat().st_size
    seen = {folder_fingerprint(tmp_path)}
    # The last one lies in the middle block.
    places = [500_000, size - 500_000, (size - 65_536) * 32 // 65 + 40_000]
    for place in places:
        flip(path, place)
        seen.add(folder_fingerprint(tmp_path))
    assert len(seen) == 4
    w = np.random.default_rng(0).integers(0, 255, (10, 1 << 20), np.uint8)
    write_safetensors(path, {"w": w})
    assert folder_fingerprint(tmp_path) not in seen


def test_a_missing_config_is_a_model_error(model: Path):
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        folder_fingerprint(model)
