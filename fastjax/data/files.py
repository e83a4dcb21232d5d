"""Finds data files: a file, a glob, or a folder with one file a split; reads them."""

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fastjax.data.arrow_rows import read_arrow_rows, read_parquet_rows
from fastjax.data.bad_rows import BadRows
from fastjax.data.csv_rows import read_csv_rows
from fastjax.data.json_rows import read_json_rows
from fastjax.data.opened_file import DECOMPRESSORS
from fastjax.data.rows import Row
from fastjax.data.text_rows import read_text_rows
from fastjax.errors import DataError, printable
from fastjax.files import user_path

Reader = Callable[[Path, BadRows], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".json": read_json_rows,
    ".jsonl": read_json_rows,
    ".ndjson": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
    ".parquet": read_parquet_rows,
    ".arrow": read_arrow_rows,
    ".txt": read_text_rows,
}
"""How files of a suffix are read; those of text may be compressed too."""

_NOT_COMPRESSED = (".parquet", ".arrow")
EVAL_SPLITS = ("validation", "valid", "val", "eval", "dev", "test")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


def data_files(source: str | Path, *, split: str = "train") -> list[Path]:
    """Returns the files that `source` names, sorted.

    Args:
      source: File, glob or folder. A folder gives the files of `split`, or all of its
        files when none of them is named after a split.
      split: Files belong to it whose name begins with it: train.jsonl, train-001.json.

    Raises:
      DataError: Nothing is there, or nothing of a kind that is read.
    """
    path = user_path(source)
    if os.path.isdir(path):
        return _folder_files(path, split)
    if os.path.isfile(path):
        return [_readable(path)]
    if _GLOB_CHARACTERS.search(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [_readable(name) for name in found if name.is_file()]
        if files:
            return files
        raise _missing(path, "no file matches this pattern")
    raise _missing(path, "no such file or folder")


def read_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Returns the rows of one file of a known kind.

    Raises:
      DataError: The file cannot be read, or `bad_rows` is spent.
    """
    return READERS[_kind(path)](path, bad_rows)


def is_data_file_name(name: str | Path) -> bool:
    """Tells whether a name ends as data files do."""
    return _kind(Path(name)) in READERS


def eval_files(folder: str | Path, *, split: str = "test") -> list[Path]:
    """Returns the evaluation files of a folder: those of `split`, else of its kin."""
    path = user_path(folder)
    if not os.path.isdir(path):
        return []
    for name in (split, *EVAL_SPLITS):
        files = [file for file in _listed(path) if _is_of_split(file, name)]
        if files:
            return files
    return []


def _folder_files(folder: Path, split: str) -> list[Path]:
    if (folder / split).is_dir():
        return _folder_files(folder / split, split)
    files = _listed(folder)
    chosen = [file for file in files if _is_of_split(file, split)]
    splits = ("train", *EVAL_SPLITS)
    named = [file for file in files if any(_is_of_split(file, s) for s in splits)]
    if chosen or (files and not named):
        return chosen or files
    held = ", ".join(sorted(printable(file.name, 60) for file in folder.iterdir())[:8])
    raise DataError(
        f"the folder has no data file of the split {split!r}",
        where=str(folder),
        fix=f"it holds: {held or 'nothing'}; name a file, or a file {split}.jsonl",
        code="FJ-DATA-MISSING",
    )


def _listed(folder: Path) -> list[Path]:
    """Returns the data files of a folder; texts only where there is nothing else."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    known = [file for file in files if is_data_file_name(file)]
    return [file for file in known if _kind(file) != ".txt"] or known


def _kind(path: Path) -> str:
    """Returns the suffix that says how a file is read, without that of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in DECOMPRESSORS:
        inner = suffixes[0] if len(suffixes) > 1 else ""
        return suffixes[-1] if inner in _NOT_COMPRESSED else inner
    return suffixes[-1] if suffixes else ""


def _is_of_split(file: Path, split: str) -> bool:
    stem = file.name.split(".")[0].lower()
    return re.fullmatch(re.escape(split.lower()) + r"([-_].*|\d*)", stem) is not None


def _readable(path: Path) -> Path:
    if is_data_file_name(path):
        return path
    suffixes = "".join(path.suffixes[-2:])
    raise DataError(
        f"files of the kind {printable(suffixes) or 'without a suffix'!r} are not read",
        where=str(path),
        fix=f"convert it to one of {', '.join(READERS)}, which but for "
        f"{' and '.join(_NOT_COMPRESSED)} may end in {', '.join(DECOMPRESSORS)}",
        code="FJ-DATA-KIND",
    )


def _missing(path: Path, what: str) -> DataError:
    parent = path.parent
    if not os.path.isdir(parent):
        near = "; its folder does not exist either"
    else:
        names = sorted(entry.name for entry in parent.iterdir())
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        shown = close or [name for name in names if is_data_file_name(name)][:5]
        listed = ", ".join(printable(name, 60) for name in shown)
        near = f"; {'nearest names' if close else 'beside it'}: {listed or 'nothing'}"
    fix = f"check the path{near}"
    return DataError(what, where=str(path), fix=fix, code="FJ-DATA-MISSING")
