"""Named points at which a test may make a run fail.

`FASTJAX_FAULT=MODE@POINT` or `MODE@POINT@STEP`, for example `kill@save:after_state@4`.
Unset, which is always so outside tests, a point costs one look at the environment.
"""

import errno
import os
import signal

VARIABLE = "FASTJAX_FAULT"


class InjectedFault(RuntimeError):
    """Raised by the mode "raise"; nothing in the package catches it."""


def hit(point: str, step: int) -> None:
    """Fails here when the environment names this point, and this step or none.

    Raises:
      OSError: Mode "enospc": the disk seems full.
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
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
        case "raise":
            raise InjectedFault(place)
        case _:
            raise ValueError(f"{VARIABLE}={wanted!r} names no known mode")
