"""The folder of a run: its name, its settings, whether it can be used."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

from rich.console import Console

from fastjax import files
from fastjax.config import TrainConfig
from fastjax.config_file import config_yaml
from fastjax.flat_config import flat_values
from fastjax.terminal import say
from fastjax.train.lock import output_lock

_HASH_DIGITS = 8


def default_output_dir(config: TrainConfig) -> str:
    """Returns a folder that the same configuration finds again."""
    values = flat_values(config)
    values.pop("output_dir")
    text = json.dumps(values, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]
    return f"outputs/{Path(config.model).name}-{digest}"


def write_settings(path: Path, config: TrainConfig) -> None:
    """Writes a file that `--config` takes."""
    with files.storage_errors(f"write {path.name}", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, config_yaml(config))


def require_writable(folder: Path, console: Console) -> None:
    """Finds out whether the folder can be made and used; a new one is taken away."""
    places = (folder, *folder.absolute().parents)
    with files.storage_errors("use the output folder", folder):
        new = [place for place in places if not place.exists()]
        existing = places[len(new)]
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{existing} cannot be written")
        folder.mkdir(parents=True, exist_ok=True)
        with output_lock(folder, lambda note: say(console, note)):
            pass
    for place in new:
        with contextlib.suppress(OSError):  # in use by now
            place.rmdir()
