"""The weights of a run, read by the system while data and step are prepared."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastjax import runtime
from fastjax.api.loading import files_of
from fastjax.config import TrainConfig
from fastjax.errors import FastJaxError

_BLOCK_BYTES = 2**28
"""Large, since between blocks it waits for its turn among the threads."""
_MOST_OF_MEMORY = 0.5


@contextlib.contextmanager
def reading_ahead(config: TrainConfig) -> Iterator[None]:
    """Has the system read the files of a model that is found, while the inside runs.

    What cannot be read the inside will tell of when it comes to load it.
    """
    try:
        paths = files_of(config)
    except (FastJaxError, OSError):
        paths = ()
    stop = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            read_ahead(paths, stop)

    thread = threading.Thread(target=read, name="read-ahead")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def read_ahead(paths: Sequence[Path], stop: threading.Event) -> int:
    """Reads files and drops what they hold, so that the system has it at hand.

    Files so large that the system would not keep them are left alone.

    Args:
      paths: The files.
      stop: Is looked at before each block.

    Returns:
      Bytes that were read.

    Raises:
      OSError: A file cannot be read.
    """
    most = _MOST_OF_MEMORY * runtime.host_memory_bytes()
    if sum(path.stat().st_size for path in paths) > most:
        return 0
    block, total = bytearray(_BLOCK_BYTES), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and (count := file.readinto(block)):
                total += count
    return total
