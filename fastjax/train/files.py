"""Files that survive a crash: written aside, flushed, then renamed into place."""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastjax.errors import ModelError, StorageError, printable


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turns a failure of the file system into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(action, path, error.strerror or str(error)) from error


def storage_error(action: str, path: Path, reason: str) -> StorageError:
    """Returns the error for a file that cannot be written."""
    return StorageError(
        f"cannot {action}: {printable(reason)}",
        where=f"{path} ({mebibytes(free_bytes(path))} free)",
        fix="free space there or give another output_dir, then run the command again",
    )


def mebibytes(count: int) -> str:
    """Returns a size for people."""
    return f"{count / 2**20:,.1f} MiB"


def free_bytes(path: Path) -> int:
    """Returns the free space of the disk that holds, or would hold, the path."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


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


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is, at any moment, the old one or the new one."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Renames and flushes the folder that holds the name."""
    old.rename(new)
    fsync(new.parent)


def set_aside(path: Path, suffix: str) -> Path:
    """Renames to `NAME.suffix`; what had that name is deleted afterwards.

    So one generation stays, and no folder grows with each new start.
    """
    target = path.with_name(f"{path.name}.{suffix}")
    doomed = path.with_name(f".tmp-{target.name}-{os.getpid()}")
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
