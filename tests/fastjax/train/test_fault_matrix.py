"""Every fault point, every kind of fault, every file: nothing saved is ever lost."""

import errno
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastjax import files
from fastjax.errors import StorageError
from fastjax.train import checkpoint, faults, resume

ROOT = Path(__file__).parents[3]
POINTS = sorted(
    {
        found
        for path in (ROOT / "fastjax").rglob("*.py")
        for found in re.findall(r'faults\.hit\(\s*"([^"]+)"', path.read_text())
    }
)
ERRORS = ("enospc", "eio", "raise")
# Steps of the tiny run at which a point is passed; the others are at all of these.
STEPS = {
    "save:before_delete": (6, 8),
    "finish:before_adapter": (8,),
    "finish:after_adapter": (8,),
}
# Points at which a checkpoint is whole, so that the disk may damage it.
DAMAGED = ("save:after_manifest", "save:after_rename")
RUNS = 200


def outcome(output: Path) -> bytes:
    return (output / "adapter_model.bytes").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny.train(folder)
    return folder


def test_points_are_found() -> None:
    assert {"step", "save:after_state", "finish:after_adapter", *DAMAGED} <= {*POINTS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_fails_anywhere_ends_the_same(
    tiny: SimpleNamespace,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    kind: str,
) -> None:
    for step in STEPS.get(point, (4, 6, 8)):
        monkeypatch.setenv(faults.VARIABLE, f"{kind}@{point}@{step}")
        try:
            tiny.train(tmp_path)
        except (OSError, faults.InjectedFault):
            pass
        else:
            pytest.fail(f"{kind}@{point}@{step} was not told")
    monkeypatch.delenv(faults.VARIABLE)
    tiny.train(tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "truncate"])
@pytest.mark.parametrize("point", DAMAGED)
def test_a_disk_that_damages_what_was_written_is_noticed(
    tiny: SimpleNamespace,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    kind: str,
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"{kind}@{point}@6")
    with monkeypatch.context() as stop:
        stop.setattr(checkpoint, "rotate", lambda *_: None)
        tiny.train(tmp_path, max_steps=8)
    shutil.rmtree(tmp_path / "checkpoint-000008")
    (tmp_path / "run.json").unlink()
    monkeypatch.delenv(faults.VARIABLE)
    tiny.train(tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    assert (tmp_path / "checkpoint-000006.broken").is_dir()


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut to nothing": _cut(0),
    "cut to a half": _cut(0.5),
    # The last byte of a JSON file is a line end, which says nothing.
    "cut by two bytes": lambda path: os.truncate(path, path.stat().st_size - 2),
    "a bit flipped": _flipped,
    "gone": Path.unlink,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_falls_back(
    tmp_path: Path, whole: Path, damage: str
) -> None:
    for path in files.files_below(whole / "checkpoint-000008"):
        if not path.stat().st_size:
            continue
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        DAMAGES[damage](folder / path.relative_to(whole))
        found = resume.find(folder, "auto", lambda note: None)
        assert found is not None
        assert found.step == 6, path
        assert (folder / "checkpoint-000008.broken").is_dir()
        shutil.rmtree(folder)


def test_names_appear_only_after_what_they_name_is_on_the_disk(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a power cut respects: files, folders, the name, its folder."""
    order: list[tuple[str, Path]] = []
    flush, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        order.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        order.append(("rename", Path(new)))
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    tiny.train(tmp_path, max_steps=2, save_steps=2, eval_steps=0)
    name = tmp_path / "checkpoint-000002"
    (at,) = [i for i, entry in enumerate(order) if entry == ("rename", name)]
    flushed = {path for what, path in order[:at] if what == "flush"}
    aside = {path for path in flushed if ".tmp-checkpoint-000002" in str(path)}
    for path in (name, *name.rglob("*")):
        within = path.relative_to(name)
        # The manifest has a temporary name when it is flushed.
        assert within.name == "manifest.json" or any(
            p.parts[len(name.parts) :] == within.parts for p in aside
        ), within
    assert any("manifest.json" in p.name for p in aside)
    assert order[at + 1] == ("flush", tmp_path)


def test_a_disk_that_cannot_rename_loses_nothing(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.train(tmp_path, max_steps=2)

    def refuse(*_: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as broken:
        broken.setattr(files, "rename", refuse)
        with pytest.raises(StorageError, match="cross-device"):
            tiny.train(tmp_path, max_steps=4, allow_config_change=True)
    found = resume.find(tmp_path, "auto", lambda note: None)
    assert found is not None
    assert found.step == 2
    assert not list(tmp_path.glob(".tmp-*"))


def trained_until(
    deadline: float | None, tiny: SimpleNamespace, output: Path, cache: Path
) -> bool:
    """Returns whether a process ends its run; kills it after `deadline` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastjax.train.loop"])
    settings = {"output": str(output), "environment": {}, "cache": str(cache)}
    arguments = (str(tiny.path), {"settings": settings}, "killable")
    process = context.Process(target=runpy.run_path, args=arguments)
    process.start()
    process.join(deadline)
    process.kill()
    process.join()
    # It may have ended between the two.
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.slow
def test_200_runs_killed_at_random_moments_end_the_same(
    tiny: SimpleNamespace, tmp_path: Path, whole: Path, compiled_programs: Path
) -> None:
    """Kills by the clock, anywhere; a run that escapes does not count."""
    draw, adapters, kills = random.Random(0), 0, 0
    for name in ("compiles", "timed"):
        start = time.perf_counter()
        assert trained_until(None, tiny, tmp_path / name, compiled_programs)
        seconds = time.perf_counter() - start
    output = tmp_path / "killed"
    while adapters < RUNS:
        tries = 0
        # Ever more time, so that it ends on a machine that became busy meanwhile.
        while not trained_until(
            draw.uniform(0.1, 1.0 + tries) * seconds, tiny, output, compiled_programs
        ):
            tries += 1
        assert outcome(output) == outcome(whole), kills
        kills, adapters = kills + tries, adapters + bool(tries)
        shutil.rmtree(output)
    sys.stdout.write(f"{adapters} adapters bit-equal after {kills} kills\n")
