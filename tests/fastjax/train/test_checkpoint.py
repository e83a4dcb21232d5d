"""Checkpoints: bit-exact, whole or not there, and found again whatever happened."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastjax import files
from fastjax.config import OptimizerConfig
from fastjax.errors import ModelError, StorageError
from fastjax.train import checkpoint, faults, manifest, resume
from fastjax.train.optimizer import make_optimizer
from fastjax.train.state import TrainState, init_state

Break = Callable[[Path], object]


def make_state(tiny: SimpleNamespace) -> TrainState:
    _, trainable, _ = tiny.split()
    state = init_state(trainable, make_optimizer(OptimizerConfig(), 10), "float16")
    return dataclasses.replace(state, step=jnp.int32(7))


@pytest.fixture(scope="session")
def two(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for step in (2, 4):
        save(tiny, folder, step)
    return folder


@pytest.fixture
def out(two: Path, tmp_path: Path) -> Path:
    """An output folder with checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(two, tmp_path / "out"))


def save(tiny: SimpleNamespace, folder: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(
        folder,
        make_state(tiny),
        {"note": "x"},
        step=step,
        write_adapter=tiny.write_adapter,
        keep=keep,
    )


def find(folder: Path, mode: str = "auto") -> tuple[resume.Found | None, list[str]]:
    notes: list[str] = []
    return resume.find(folder, mode, notes.append), notes


def test_state_comes_back_bit_for_bit(tiny: SimpleNamespace, out: Path) -> None:
    state = make_state(tiny)
    found, notes = find(out)
    assert found is not None
    assert (found.step, notes) == (4, [])
    shapes = jax.eval_shape(lambda: state)
    back = checkpoint.read_state(found.folder, shapes, found.record)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for actual, expected in zip(
        jax.tree.leaves(back), jax.tree.leaves(state), strict=True
    ):
        assert actual.dtype == expected.dtype
        # Else the step would be another program, and be compiled again.
        assert actual.committed == expected.committed
        np.testing.assert_array_equal(actual, expected)


def test_a_state_that_is_read_is_on_the_device_once(
    tiny: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = jax.eval_shape(lambda: make_state(tiny))
    record = checkpoint.read_record(out / checkpoint.name_of(4))
    before, make, arrays = jax.live_arrays(), jnp.array, []

    def counting(*args, **kwargs):
        arrays.append(len(jax.live_arrays()) - len(before))
        return make(*args, **kwargs)

    monkeypatch.setattr(jnp, "array", counting)
    state = checkpoint.read_state(out / checkpoint.name_of(4), like, record)
    assert arrays == list(range(len(jax.tree.leaves(state))))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def data_file(folder: Path) -> Path:
    found = (path for path in (folder / "state").rglob("*") if path.is_file())
    return max(found, key=lambda path: path.stat().st_size)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


BREAKS: dict[str, Break] = {
    "adapter cut to nothing": lambda f: os.truncate(f / "adapter_model.bytes", 0),
    "adapter cut by one": lambda f: os.truncate(
        f / "adapter_model.bytes", (f / "adapter_model.bytes").stat().st_size - 1
    ),
    "adapter bit": lambda f: flip(f / "adapter_model.bytes"),
    "state bit": lambda f: flip(data_file(f)),
    "state cut": lambda f: os.truncate(data_file(f), 10),
    "state file gone": lambda f: data_file(f).unlink(),
    "state file unreadable": lambda f: link_to_itself(data_file(f)),
    "record garbage": lambda f: (f / "trainer_state.json").write_text("{"),
    "record empty": lambda f: (f / "trainer_state.json").write_text(""),
    "manifest gone": lambda f: (f / "manifest.json").unlink(),
    "manifest garbage": lambda f: (f / "manifest.json").write_text("NaN"),
    "manifest without files": lambda f: (f / "manifest.json").write_text("{}"),
    "manifest of numbers": lambda f: (f / "manifest.json").write_text(
        '{"files": {"trainer_state.json": 3}}'
    ),
    "manifest binary": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_newest_one_falls_back(out: Path, fault: str) -> None:
    BREAKS[fault](out / "checkpoint-000004")
    found, notes = find(out)
    assert found is not None
    assert found.step == 2
    assert "checkpoint-000004 is broken" in notes[0]
    assert (out / "checkpoint-000004.broken").is_dir()


@pytest.mark.parametrize("fault", BREAKS)
def test_a_given_broken_path_never_falls_back(out: Path, fault: str) -> None:
    broken = out / "checkpoint-000004"
    BREAKS[fault](broken)
    with pytest.raises(ModelError, match="cannot be used") as caught:
        find(out, str(broken))
    assert caught.value.exit_code == 4
    assert broken.is_dir()


def test_a_missing_path(out: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        find(out, str(out / "checkpoint-000009"))


def test_a_given_older_one_puts_newer_ones_aside(out: Path) -> None:
    found, _ = find(out, str(out / "checkpoint-000002"))
    assert found is not None
    assert found.step == 2
    assert (out / "checkpoint-000004.old").is_dir()


def test_all_broken_lists_each_reason_and_keeps_them(out: Path) -> None:
    flip(out / "checkpoint-000004" / "adapter_model.bytes")
    (out / "checkpoint-000002" / "manifest.json").unlink()
    with pytest.raises(ModelError) as caught:
        find(out)
    text = str(caught.value)
    assert "checkpoint-000004: adapter_model.bytes has other bytes" in text
    assert "checkpoint-000002: manifest.json cannot be read" in text
    assert len(checkpoint.checkpoints(out)) == 2


def test_extra_files_and_empty_folders_do_no_harm(out: Path) -> None:
    (out / "checkpoint-000004" / "notes.txt").write_text("mine")
    (out / "checkpoint-000300").mkdir()
    found, _ = find(out)
    assert found is not None
    assert found.step == 4
    assert not (out / "checkpoint-000300").exists()


def test_leftovers_are_removed(out: Path) -> None:
    (out / ".tmp-checkpoint-000006-77").mkdir()
    (out / ".tmp-checkpoint-000006-77" / "x").write_text("x")
    (out / ".tmp-run.json-77").write_text("x")
    files.remove_leftovers(out)
    assert not list(out.glob(".tmp-*"))


def test_old_ones_rotate_by_step(tiny: SimpleNamespace, out: Path) -> None:
    os.utime(out / "checkpoint-000004", (0, 0))
    save(tiny, out, 1000000, keep=2)
    names = [path.name for path in checkpoint.checkpoints(out)]
    assert names == ["checkpoint-000004", "checkpoint-1000000"]


def test_no_space_is_said_before_anything_is_written(
    tiny: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(StorageError, match="it needs"):
        save(tiny, out, 6)
    assert len(checkpoint.checkpoints(out)) == 2


@pytest.mark.parametrize(
    "point", ["save:after_adapter", "save:after_state", "save:after_manifest"]
)
def test_a_failing_save_leaves_no_trace(
    tiny: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"enospc@{point}")
    with pytest.raises(StorageError) as caught:
        save(tiny, out, 6)
    assert caught.value.exit_code == 8
    assert len(str(caught.value).splitlines()) <= 4
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-000002",
        "checkpoint-000004",
    ]


def test_the_storage_engine_failing_is_a_storage_error(
    tiny: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tiny, out, 6)


def test_the_device_failing_is_no_storage_error(
    tiny: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access")

    places = ((checkpoint.ocp.Checkpointer, "save"), (jax, "block_until_ready"))
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(jax.errors.JaxRuntimeError, match="illegal memory"):
                save(tiny, out, 6)
    assert len(checkpoint.checkpoints(out)) == 2


def test_manifest_is_written_last_and_lists_everything(out: Path) -> None:
    folder = out / "checkpoint-000004"
    listed = files.read_json(folder / "manifest.json")["files"]
    present = {p.relative_to(folder).as_posix() for p in files.files_below(folder)}
    assert set(listed) == present - {"manifest.json"}
    assert manifest.problems(folder) == []
    newest = max(files.files_below(folder), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "manifest.json"
