"""A model is quantised once; the copy gives the same bits and follows the files."""

import os
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from conversions.hf import (
    Checkpoint,
    load_packed_weights,
    packed_cache,
    read_config,
)
from fastjax.config import DType, QuantConfig
from fastjax.models.build import Weights

FOLDER = "tiny_llama3"


def _loaded(model: Path, cache: Path, dtype: DType = "bfloat16") -> Weights:
    weights = load_packed_weights(
        Checkpoint(model),
        read_config(model),
        dtype=dtype,
        quant=QuantConfig(),
        folder=cache,
        least_bytes=0,
    )
    for thread in threading.enumerate():
        if thread.name == "packed-cache":
            thread.join()
    return weights


def test_the_copy_has_every_bit_and_follows_the_files(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(fixtures / FOLDER, model)
    expected = _loaded(model, cache)
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "stream_weights", None)
        actual = _loaded(model, cache)
        os.utime(model / "model.safetensors", ns=(1, 1))
        with pytest.raises(TypeError):  # it is read again
            _loaded(model, cache)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert jax.tree.structure(actual[name]) == jax.tree.structure(value)
        for leaf, other in zip(
            jax.tree.leaves(actual[name]), jax.tree.leaves(value), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


def test_a_damaged_copy_is_made_again_within_no_memory(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "_HELD_SHARE", 0.0)
    expected = _loaded(fixtures / FOLDER, tmp_path)
    (copy,) = tmp_path.iterdir()
    size = copy.stat().st_size
    os.truncate(copy, size // 2)
    assert _loaded(fixtures / FOLDER, tmp_path).keys() == expected.keys()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [size]


def test_the_cache_keeps_few_copies_and_no_leftovers(
    fixtures: Path, tmp_path: Path
) -> None:
    for index in range(10):
        path = tmp_path / f"{index}.safetensors"
        path.touch()
        os.utime(path, (index, index))
    for name, age in {"killed": 1e4, "writing": 0.0}.items():
        path = tmp_path / f".tmp-{name}"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    _loaded(fixtures / FOLDER, tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"3.safetensors", "9.safetensors", ".tmp-writing"} <= kept
    assert not {"2.safetensors", ".tmp-killed"} & kept
    assert len(kept) == 9


def test_without_room_the_weights_come_all_the_same(
    fixtures: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert _loaded(fixtures / FOLDER, blocked)


def test_copies_of_another_kind_stay_and_old_ones_go(
    fixtures: Path, tmp_path: Path
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(fixtures / FOLDER, model)
    _loaded(model, cache)
    (first,) = cache.iterdir()
    _loaded(model, cache, "float16")
    assert len(set(cache.iterdir())) == 2
    os.utime(model / "model.safetensors", ns=(1, 1))
    _loaded(model, cache)
    assert len(set(cache.iterdir())) == 2
    assert not first.exists()
