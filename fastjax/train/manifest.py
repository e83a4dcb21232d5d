"""A checkpoint's table of contents: each file's size and SHA-256, written last."""

import hashlib
from pathlib import Path

from fastjax import files
from fastjax.errors import ModelError, printable

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Lists every file of the folder, read back from the disk, in `manifest.json`."""
    entries = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in files.files_below(folder)
    }
    files.write_atomic(folder / NAME, files.dump_json({"files": entries}))


def problems(folder: Path) -> list[str]:
    """Returns what is wrong with the files of a checkpoint; empty when it is whole.

    A file that the manifest does not list is no problem: nothing reads it.
    """
    try:
        listed = files.read_json(folder / NAME).get("files")
    except ModelError as error:
        return [error.what]
    if not isinstance(listed, dict) or not listed:
        return [f"{NAME} lists no files"]
    present = {
        path.relative_to(folder).as_posix(): path for path in files.files_below(folder)
    }
    found = []
    for name, entry in listed.items():
        if name not in present:
            found.append(f"{printable(name)} is missing")
        elif (actual := _entry(present[name])) != entry:
            found.append(f"{printable(name)} {_difference(actual, entry)}")
    return found


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _difference(actual: dict[str, int | str], entry: object) -> str:
    size = entry.get("size") if isinstance(entry, dict) else None
    if actual["size"] != size:
        return f"has {actual['size']} bytes, not {printable(size)}"
    return "has other bytes than were written (SHA-256 differs)"
