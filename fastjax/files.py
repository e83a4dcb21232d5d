"""Files and folders that appear whole or not at all: written aside, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastjax.errors import ModelError, StorageError, printable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE_BYTES = 64 * 2**20
_MODEL_CONFIGS = ("config.json", "adapter_config.json")
_MODEL_FOLDERS = {"additional_chat_templates"}
_RUN_FILES = ("run.json", "metrics.jsonl", "manifest.json", "trainer_state.json")
_ABANDONED_SECONDS = 3600.0


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns a failure of the file system into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason, is_full = error.strerror or str(error), error.errno in DISK_FULL
        raise storage_error(action, path, reason, is_full=is_full) from error


def storage_error(
    action: str, path: Path, reason: str, *, is_full: bool
) -> StorageError:
    """Returns the error for a file that cannot be written."""
    free = f" ({mebibytes(free_bytes(path))} free)" if is_full else ""
    remedy = "free space there" if is_full else "check that path"
    return StorageError(
        f"cannot {action}: {printable(reason)}",
        where=f"{path}{free}",
        fix=f"{remedy} or give another output_dir, then run the command again",
    )


def mebibytes(count: int) -> str:
    """Returns a size for people."""
    return f"{count / 2**20:,.1f} MiB"


def binary_size(count: int) -> str:
    """Returns a size for people, in GiB from a tenth of one on."""
    gib = count / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else mebibytes(count)


def free_bytes(path: Path) -> int:
    """Returns the free space of the disk that holds, or would hold, the path."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed_bytes: int) -> None:
    """Makes sure that a file or folder of that size can be made at `path`.

    Raises:
      StorageError: The disk has less, or less than 64 MiB would be left.
    """
    free = free_bytes(path)
    if free < needed_bytes + _SPARE_BYTES:
        raise StorageError(
            f"the disk is too full: {binary_size(needed_bytes)} are needed besides the "
            f"{binary_size(_SPARE_BYTES)} that stay free, {binary_size(free)} are free",
            where=str(path),
            fix="free some space, or choose another folder",
        )


def fsync(path: Path) -> None:
    """Flushes one file or one directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """Returns every file of the folder and its subfolders, in order of name."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def settle(folder: Path) -> None:
    """Gives every file the permissions of the umask and flushes the whole folder."""
    umask = os.umask(0)
    os.umask(umask)
    for path in files_below(folder):
        path.chmod(stat.S_IMODE(0o666 & ~umask))
        fsync(path)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync(path)
    fsync(folder)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` once it is on the disk.

    Its permissions follow the umask. An error removes it and leaves an older file of
    that name as it was.

    Raises:
      StorageError: The file cannot be written.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with storage_errors(f"write {path.name}", path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_free_name(
    path: Path, *, overwrite: bool, sources: Iterable[Path] = ()
) -> None:
    """Raises `StorageError` if the name is taken and may not be replaced.

    Args:
      path: A file or folder that is to be written.
      overwrite: What has the name may go, if it is a file, an empty folder or that of a
        model; never a run's, nor one that holds a source or the current folder.
      sources: What is read for it.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StorageError(
            f"{path} exists already",
            fix="choose another name, or replace it: --overwrite, in Python "
            "overwrite=True",
        )
    real = path.resolve()
    for held in (*sources, Path.cwd()):
        if real == held.resolve() or real in held.resolve().parents:
            raise StorageError(
                f"{path} cannot be replaced: it is, or holds, {held}, which is in use",
                fix="choose another folder",
            )
    if real.is_dir() and any(real.iterdir()) and not _is_of_a_model(real):
        raise StorageError(
            f"{path} is not replaced: it is no model's folder, or a run's",
            fix="choose another folder, or delete this one yourself",
        )


def _is_of_a_model(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    has_model = not names.isdisjoint(_MODEL_CONFIGS) or any(folder.glob("*.gguf"))
    return has_model and names.isdisjoint(_RUN_FILES) and folders <= _MODEL_FOLDERS


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder that takes the name `path` at the end.

    Args:
      path: Final name; its parents are made.
      overwrite: Replaces what has that name; else that is an error.

    Raises:
      StorageError: The name is taken, or the folder cannot be written.
    """
    require_free_name(path, overwrite=overwrite)
    temporary = path.with_name(temporary_name(path.name))
    old = path.with_name(temporary_name(path.name, "old"))
    try:
        with storage_errors(f"write {path.name}", path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in temporary.rglob("*"):
                fsync(written)
            fsync(temporary)
            if os.path.lexists(path):
                path.rename(old)
            temporary.rename(path)
            fsync(path.parent)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    finally:
        for leftover in (temporary, old):
            with contextlib.suppress(OSError):
                _remove(leftover)


@contextlib.contextmanager
def added_files(folder: Path, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files go into `folder` at the end, each whole.

    What else lies there stays.

    Args:
      folder: Exists.
      replaces: Patterns of files that would not fit the new ones: such as are not
        written again are deleted, at last.

    Raises:
      StorageError: They cannot be written.
    """
    aside = folder / temporary_name("added")
    is_whole = False
    with storage_errors(f"write into {folder.name}", folder):
        try:
            aside.mkdir()
            yield aside
            settle(aside)
            added = [path.relative_to(aside) for path in files_below(aside)]
            for name in added:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if (folder / name).is_dir():
                    raise IsADirectoryError(
                        errno.EISDIR, "a folder has that name", str(name)
                    )
            is_whole = True
            for name in added:
                (aside / name).replace(folder / name)
            for pattern in replaces:
                for path in folder.glob(pattern):
                    if path.relative_to(folder) not in added:
                        path.unlink()
            fsync(folder)
        finally:
            # What is left of a whole one may be all there is.
            if not (is_whole and files_below(aside)):
                shutil.rmtree(aside, ignore_errors=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is, at any moment, the old one or the new one."""
    with new_file(path) as file:
        file.write(text.encode())


def user_path(name: str | Path) -> Path:
    """Returns a path as a user gives it, `~` replaced by the home folder.

    Ask `os.path` whether it exists: `Path` raises where a name is too long.
    """
    return Path(os.path.expanduser(name))


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless it is there.

    Raises:
      StorageError: It cannot be made.
    """
    with storage_errors(f"write {path.name}", path):
        path.mkdir(parents=True, exist_ok=True)


def rename(old: Path, new: Path) -> None:
    """Renames and flushes the folder that holds the name."""
    old.rename(new)
    fsync(new.parent)


def set_aside(path: Path, suffix: str) -> Path:
    """Renames to `NAME.suffix`; what had that name is deleted afterwards.

    So one generation stays, and no folder grows with each new start.
    """
    target = path.with_name(f"{path.name}.{suffix}")
    doomed = path.with_name(temporary_name(target.name))
    has_older = target.exists()
    if has_older:
        rename(target, doomed)
    rename(path, target)
    if has_older:
        _remove(doomed)
    return target


def remove_leftovers(folder: Path) -> None:
    """Deletes what a crashed run left behind under temporary names."""
    for path in folder.glob(".tmp-*"):
        _remove(path)


def remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes left in a folder that live ones write to as well.

    That is what has a temporary name and has not grown for an hour.
    """
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            newest = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > _ABANDONED_SECONDS:
                _remove(path)


def temporary_name(name: str, kind: str = "tmp") -> str:
    """Returns a name that no other process takes, also of another container or host."""
    return f".{kind}-{name}-{secrets.token_hex(6)}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def code_digest(roots: Iterable[str | Path]) -> str:
    """Returns a hash of the code below folders, and of the tables beside it."""
    digest = hashlib.sha256()
    for root in roots:
        for pattern in ("*.py", "*.json"):
            for path in sorted(Path(root).rglob(pattern)):
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def dump_json(value: Any) -> str:
    """Returns readable, strict JSON text; NaN and infinity are refused."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      ModelError: The file is missing, broken, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} cannot be read: {printable(error)}", where=str(path)
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds no JSON object", where=str(path))
    return value
