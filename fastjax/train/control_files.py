"""Empty files by which a user asks a run for something, as `touch OUT/save`."""

from pathlib import Path

SAVE, STOP = "save", "stop"


def take(output_dir: Path, name: str) -> bool:
    """Returns whether the file was there, and removes it."""
    path = output_dir / name
    if not path.is_file():
        return False
    path.unlink(missing_ok=True)
    return True
