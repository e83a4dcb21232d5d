"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastjax.errors import StorageError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` once it is on the disk.

    Its permissions follow the umask. An error removes it and leaves an older file of
    that name as it was.

    Raises:
      StorageError: The file cannot be written.
    """
    temporary = _beside(path)
    try:
        with _storage_errors(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder that takes the name `path` at the end.

    Args:
      path: Final name; its parents are made.
      overwrite: Replaces what has that name; else that is an error.

    Raises:
      StorageError: The name is taken, or the folder cannot be written.
    """
    if os.path.lexists(path) and not overwrite:
        raise StorageError(
            f"{path} exists already", fix="choose another name, or allow overwriting"
        )
    temporary, old = _beside(path), _beside(path, "old")
    try:
        with _storage_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in temporary.rglob("*"):
                _sync(written)
            _sync(temporary)
            if os.path.lexists(path):
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    finally:
        for leftover in (temporary, old):
            _remove(leftover)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless it is there.

    Raises:
      StorageError: It cannot be made.
    """
    with _storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            fix="free some space, or choose another folder",
        ) from error
