"""Whether a disk has room for what is about to be written."""

import shutil
from pathlib import Path

from fastjax.errors import StorageError

_SPARE_BYTES = 64_000_000


def require_space(path: Path, needed_bytes: int) -> None:
    """Makes sure that a file or folder of that size can be made at `path`.

    Raises:
      StorageError: The disk has less, or less than 64 MB would be left.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise StorageError(
            f"the disk is too full: {needed_bytes / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free",
            where=str(folder),
            fix="free some space, or choose another folder",
        )
