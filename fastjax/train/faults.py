"""Named points at which a test may make a run fail.

`FASTJAX_FAULT=MODE@POINT` or `MODE@POINT@STEP`, for example `kill@save:after_state@4`.
Unset, which is always so outside tests, a point costs one look at the environment.
"""

import errno
import os
import signal
from pathlib import Path

VARIABLE = "FASTJAX_FAULT"


class InjectedFault(RuntimeError):
    """Raised by the mode "raise"; nothing in the package catches it."""


def hit(point: str, step: int, folder: Path | None = None) -> None:
    """Fails here when the environment names this point, and this step or none.

    Args:
      point: Where the run is.
      step: Steps done.
      folder: What was written there; the modes "flip" and "truncate" damage its
        largest file, as a disk may do, and the run goes on.

    Raises:
      OSError: Mode "enospc": the disk seems full; mode "eio": it seems broken.
      InjectedFault: Mode "raise".
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    mode, _, place = wanted.partition("@")
    if place not in (point, f"{point}@{step}"):
        return
    match mode:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term" | "int":
            signal.raise_signal(signal.SIGTERM if mode == "term" else signal.SIGINT)
        case "enospc" | "eio":
            number = errno.ENOSPC if mode == "enospc" else errno.EIO
            raise OSError(number, os.strerror(number), point)
        case "flip" | "truncate":
            _damage(folder, mode)
        case "raise":
            raise InjectedFault(place)
        case _:
            raise ValueError(f"{VARIABLE}={wanted!r} names no known mode")


def _damage(folder: Path | None, mode: str) -> None:
    if folder is None:
        raise ValueError(f"there is nothing to {mode} at this point")
    paths = (path for path in folder.rglob("*") if path.is_file())
    largest = max(paths, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content if mode == "flip" else content[: len(content) // 2])
