"""One file or shards and index: nothing leads out of the folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conversions.hf import Checkpoint
from conversions.safetensors_writer import write_safetensors
from fastjax.errors import CheckpointMismatch, ModelError

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, weight_map: object, **shards: dict[str, int]) -> Path:
    for name, tensors in shards.items():
        arrays = {key: np.full(2, value, np.float32) for key, value in tensors.items()}
        write_safetensors(folder / f"{name}.safetensors", arrays)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_one_set_of_tensors(fixtures: Path):
    whole = Checkpoint(fixtures / "tiny_llama3")
    parts = Checkpoint(fixtures / "tiny_llama3_sharded")
    assert set(parts.tensors) == set(whole.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absolute", "must be the name"),
        ("traversal", "must be the name"),
        ("missing_shard", "nope.safetensors is missing"),
        ("no_weight_map", "weight_map"),
        ("not_dict", "this is list"),
    ],
)
def test_bad_indexes_are_refused(
    fixtures: Path, tmp_path: Path, name: str, reason: str
):
    shutil.copyfile(fixtures / "bad_index" / f"{name}.json", tmp_path / INDEX)
    with pytest.raises(ModelError, match=reason):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [3, None, "x.bin", "a\\b.safetensors", "C:x.safetensors", ".x.safetensors", "\n"],
)
def test_only_plain_names_of_shards_pass(tmp_path: Path, shard):
    with pytest.raises(ModelError, match="must be the name"):
        Checkpoint(sharded(tmp_path, {"a": shard}))


def test_index_and_shards_must_agree(tmp_path: Path):
    weight_map = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    folder = sharded(tmp_path, weight_map, x={"a": 1, "c": 2}, y={"c": 3})
    with pytest.raises(CheckpointMismatch) as caught:
        Checkpoint(folder)
    assert "the shard lacks: b" in caught.value.what
    assert "puts elsewhere: c" in caught.value.what


def test_links_out_of_the_folder_are_refused(tmp_path: Path, fixtures: Path):
    (tmp_path / "x.safetensors").symlink_to(
        fixtures / "tiny_llama3" / "model.safetensors"
    )
    with pytest.raises(ModelError, match="leaves the model folder"):
        Checkpoint(sharded(tmp_path, {"a": "x.safetensors"}))
    (tmp_path / INDEX).unlink()
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="leaves the model folder"):
        Checkpoint(tmp_path)


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path: Path, fixtures: Path):
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "123"
    shutil.copyfile(fixtures / "tiny_llama3" / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/123"))
    assert "model.norm.weight" in Checkpoint(snapshot).tensors


def test_pickles_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ModelError, match="no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model.bin\)"):
        Checkpoint(tmp_path)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(ModelError, match="does not exist"):
        Checkpoint(tmp_path / "nope")
