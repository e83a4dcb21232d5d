"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from fastjax.errors import StorageError
from fastjax.files import (
    added_files,
    new_file,
    new_folder,
    require_free_name,
    require_space,
)


def test_folder_appears_at_the_end(tmp_path: Path):
    path = tmp_path / "deep" / "folder"
    with new_folder(path) as new:
        (new / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


def test_taken_name_is_refused_unless_overwriting(tmp_path: Path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text("old")
    with pytest.raises(StorageError, match="exists already"), new_folder(path):
        pass
    with new_folder(path, overwrite=True) as new:
        (new / "x").write_text("1")
    assert [p.name for p in path.iterdir()] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_is_no_model_or_in_use_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, run, texts = (tmp_path / name for name in ("model", "run", "texts"))
    other, source = tmp_path / "other", tmp_path / "source"
    for folder, file in (
        (other, "adapter_config.json"),
        (other / "checkpoint-500", "optimizer.pt"),
        (source, "config.json"),
        (source / "src", "main.py"),
        (model, "config.json"),
        (run, "adapter_config.json"),
        (run, "run.json"),
        (texts, "thesis.txt"),
    ):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text("{}")
    require_free_name(model, overwrite=True, sources=[run])
    for path, sources, reason in (
        (model, [model], "in use"),
        (tmp_path, [model], "in use"),
        (run, [], "a run's"),
        (other, [], "a run's"),
        (source, [], "no model's"),
        (texts, [], "no model's folder"),
    ):
        with pytest.raises(StorageError, match=reason):
            require_free_name(path, overwrite=True, sources=sources)
    monkeypatch.chdir(model)
    for name in (".", ".."):
        with pytest.raises(StorageError, match="in use"):
            require_free_name(Path(name), overwrite=True)


def test_an_error_leaves_the_old_folder(tmp_path: Path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(KeyError), new_folder(path, overwrite=True):
        raise KeyError
    assert path.is_dir()
    assert not list(path.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_added_files_leave_the_others(tmp_path: Path):
    for name in ("kept", "replaced", "part-1"):
        (tmp_path / name).write_text("old")
    with added_files(tmp_path, replaces=["part-*"]) as aside:
        (aside / "deep").mkdir()
        for name in ("replaced", "part-2", "deep/new"):
            (aside / name).write_text("new")
    texts = {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    new = dict.fromkeys(("replaced", "part-2", "new"), "new")
    assert texts == {"kept": "old"} | new
    with pytest.raises(KeyError), added_files(tmp_path, replaces=["*"]):
        raise KeyError
    assert {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == texts


def test_added_files_are_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("config.json", "part-2")
    (tmp_path / "part-1").write_text("old")
    (tmp_path / "part-2").mkdir()

    def add():
        with added_files(tmp_path, replaces=["part-*"]) as aside:
            for name in names:
                (aside / name).write_text("new")

    with pytest.raises(StorageError, match="a folder has that name"):
        add()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-1", "part-2"]
    (tmp_path / "part-2").rmdir()
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.name == "part-2":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add()
    assert (tmp_path / "part-1").read_text() == "old"
    assert (tmp_path / "config.json").read_text() == "new"
    [left] = [path for path in tmp_path.rglob("part-2") if path.is_file()]
    assert left.read_text() == "new"


def test_full_disk_is_a_storage_error(tmp_path: Path):
    with (
        pytest.raises(StorageError, match="free space there"),
        new_file(tmp_path / "x"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_small_need_is_told_with_what_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fastjax.files.free_bytes", lambda path: 64 * 2**20)
    told = "0.3 MiB are needed besides the 64.0 MiB that stay free, 64.0 MiB are free"
    with pytest.raises(StorageError, match=told):
        require_space(tmp_path, 300_000)
