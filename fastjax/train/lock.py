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
    """
    path = folder / NAME
    file = _acquire(path)
    try:
        if before := file.read():
            note(f"took over the lock of a run that died: {_owner(before)}")
        file.seek(0)
        file.truncate()
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.time()}
        file.write(json.dumps(owner))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> TextIO:
    """Returns the locked file that bears the name `path` at this moment."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file.read())
            file.close()
            raise ConfigError(
                f"{path.parent} is in use by another run: {owner}",
                where=str(path),
                fix="wait for it, stop it, or give another output_dir",
                code="FJ-CONFIG-LOCK",
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return printable(f"process {owner['pid']} on {owner['host']}")
    except (ValueError, TypeError, KeyError):
        return "an unknown process"
