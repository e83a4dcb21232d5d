"""What takes long and waits for nothing, begun as soon as a run starts."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from fastjax.api.loading import files_of
from fastjax.config import TrainConfig
from fastjax.errors import FastJaxError

_BLOCK_BYTES = 2**24
_MOST_OF_MEMORY = 0.5


def warm_up(config: TrainConfig) -> None:
    """Starts the GPU, and has the system read the weights, while others work.

    Where that fails the run itself will fail, and tell of it. The process does not wait
    for either at its end.
    """

    def begin(work: Callable[[], Any]) -> None:
        with contextlib.suppress(FastJaxError, OSError, RuntimeError):
            work()

    for work in (functools.partial(_read_weights, config), jax.devices):
        threading.Thread(target=begin, args=(work,), daemon=True).start()


def _read_weights(config: TrainConfig) -> None:
    read_ahead(files_of(config))


def read_ahead(paths: Iterable[Path]) -> int:
    """Reads files and drops what they hold, so that the system has it at hand.

    Files so large that the system would not keep them are left alone.

    Returns:
      Bytes that were read.

    Raises:
      OSError: A file cannot be read.
    """
    paths = list(paths)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(path.stat().st_size for path in paths) > _MOST_OF_MEMORY * physical:
        return 0
    block, total = bytearray(_BLOCK_BYTES), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                total += count
    return total
