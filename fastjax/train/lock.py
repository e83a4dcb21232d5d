"""One writer for an output folder."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from fastjax import files
from fastjax.errors import ConfigError, printable

NAME = ".lock"


@contextlib.contextmanager
def output_lock(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Holds `folder/.lock`, which the system frees when the process ends in any way.

    Args:
      folder: Exists and can be written.
      note: Is told of the lock of a run that died.

    Raises:
      ConfigError: A live run writes to the folder.
      StorageError: The folder cannot be locked.
    """
    path = folder / NAME
    with files.storage_errors("lock the output folder", folder):
        file = _acquire(path)
    try:
        with files.storage_errors("lock the output folder", folder):
            _sign(file, note)
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> TextIO:
    """Returns the locked file that bears the name `path` at this moment."""
    while True:
        with contextlib.ExitStack() as unless_locked:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            file = unless_locked.enter_context(os.fdopen(descriptor, "r+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{path.parent} is in use by another run: {_owner(file.read())}",
                    where=str(path),
                    fix="wait for it, stop it, or give another output_dir",
                    code="FJ-CONFIG-LOCK",
                ) from None
            if _has_name(file, path):
                unless_locked.pop_all()
                return file


def _has_name(file: TextIO, path: Path) -> bool:
    """Whether the run before has not taken the name away meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(file: TextIO, note: Callable[[str], None]) -> None:
    if before := file.read():
        note(f"took over the lock of a run that died: {_owner(before)}")
    file.seek(0)
    file.truncate()
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.time()}
    file.write(json.dumps(owner))
    file.flush()


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return printable(f"process {owner['pid']} on {owner['host']}")
    except (ValueError, TypeError, KeyError):
        return "an unknown process"
