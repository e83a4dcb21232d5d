"""Keeps tokenised documents for the next run, under a hash of all that made them.

An entry is a folder: tokens and masks end to end, the documents' lengths and rows, and
`entry.json`: facts of them, and the hashes of all of these, which are checked before
use. It is written aside and renamed, so that an entry is whole or absent. Entries may
be deleted at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastjax.data.documents import (
    TOKENS_NAME,
    TRAINED_NAME,
    Documents,
    DocumentWriter,
    mapped,
)
from fastjax.files import code_digest, fsync, remove_abandoned

MIN_FILE_BYTES = 4 << 20
"""Smaller data is tokenised in seconds and never kept."""

_PACKAGES = ("transformers", "tokenizers", "jinja2")
_KEPT_ENTRIES = 16
_PLACES_NAME, _ENTRY_NAME = "places.npy", "entry.json"
_HASHED_NAMES = (TOKENS_NAME, TRAINED_NAME, _PLACES_NAME)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Documents of the cache, and what was stored with them."""

    documents: Documents
    facts: dict[str, Any]


def cache_key(files: Sequence[Path], options: dict[str, Any]) -> str:
    """Returns a hash of what is in files, of how it is tokenised, and by what code.

    Args:
      files: Data files; their names and places do not count.
      options: Everything else that the documents depend on; JSON.
    """
    versions = [version(name) for name in _PACKAGES]
    made_by = [code_digest([Path(__file__).parent]), versions, options]
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
    for path in files:
        digest.update(_file_hash(path).encode())
    return digest.hexdigest()


class DocumentCache:
    """Entries of a folder.

    Args:
      root: Made when the first entry is; one that cannot be written keeps nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str) -> Entry | None:
        """Returns an entry; None when there is none, or it is not whole."""
        folder = self._root / key
        try:
            entry = json.loads((folder / _ENTRY_NAME).read_text(encoding="utf-8"))
            if entry["hashes"] != _hashes(folder, entry["facts"]):
                return None
            lengths, rows = np.load(folder / _PLACES_NAME, allow_pickle=False)
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Entry(mapped(folder, lengths, rows), entry["facts"])

    @contextlib.contextmanager
    def new_writer(self) -> Iterator[DocumentWriter]:
        """Gives a writer into a folder aside, or into memory where that cannot be."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self._root)
            aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self._root))
        except OSError:
            yield DocumentWriter()
            return
        try:
            yield DocumentWriter(aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def put(self, key: str, writer: DocumentWriter, entry: Entry) -> None:
        """Makes an entry of a `new_writer`, unless the disk is full."""
        aside = writer.folder
        if aside is None:
            return
        places = np.stack([entry.documents.lengths, entry.documents.rows])
        with contextlib.suppress(OSError):
            np.save(aside / _PLACES_NAME, places)
            hashes = _hashes(aside, entry.facts)
            text = json.dumps({"hashes": hashes, "facts": entry.facts})
            (aside / _ENTRY_NAME).write_text(text, encoding="utf-8")
            for path in aside.iterdir():
                fsync(path)
            shutil.rmtree(self._root / key, ignore_errors=True)
            aside.rename(self._root / key)
            self._forget_old()

    def _forget_old(self) -> None:
        entries = [path for path in self._root.iterdir() if len(path.name) == 64]
        entries.sort(key=lambda path: path.stat().st_mtime)
        for path in entries[:-_KEPT_ENTRIES]:
            shutil.rmtree(path, ignore_errors=True)


def _hashes(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    of_facts = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    of_files = {name: _file_hash(folder / name) for name in _HASHED_NAMES}
    return of_files | {"facts": of_facts}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
