"""Finds data files: a file, a glob, or a folder with one file a split."""

import difflib
import glob
import re
from pathlib import Path

from fastjax.errors import DataError, printable

SUFFIXES = (".json", ".jsonl", ".ndjson")
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
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path, split)
    if path.is_file():
        return [_readable(path)]
    if _GLOB_CHARACTERS.search(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [_readable(name) for name in found if name.is_file()]
        if files:
            return files
        raise _missing(path, "no file matches this pattern")
    raise _missing(path, "no such file or folder")


def eval_files(folder: str | Path, *, split: str = "test") -> list[Path]:
    """Returns the evaluation files of a folder: those of `split`, else of its kin."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return []
    for name in (split, *EVAL_SPLITS):
        files = [file for file in _listed(path) if _is_of_split(file, name)]
        if files:
            return files
    return []


def _folder_files(folder: Path, split: str) -> list[Path]:
    files = _listed(folder)
    chosen = [file for file in files if _is_of_split(file, split)]
    splits = ("train", *EVAL_SPLITS)
    named = [file for file in files if any(_is_of_split(file, s) for s in splits)]
    if chosen or (files and not named):
        return chosen or files
    held = ", ".join(sorted(printable(file.name, 60) for file in folder.iterdir())[:8])
    raise DataError(
        f"the folder has no {' or '.join(SUFFIXES)} file of the split {split!r}",
        where=str(folder),
        fix=f"it holds: {held or 'nothing'}; name a file, or a file {split}.jsonl",
        code="FJ-DATA-MISSING",
    )


def _listed(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def _is_of_split(file: Path, split: str) -> bool:
    stem = file.name.split(".")[0].lower()
    return re.fullmatch(re.escape(split.lower()) + r"([-_].*|\d*)", stem) is not None


def _readable(path: Path) -> Path:
    if path.suffix.lower() in SUFFIXES:
        return path
    raise DataError(
        f"files of the kind {printable(path.suffix) or 'without a suffix'!r} "
        "are not read",
        where=str(path),
        fix=f"convert it to one of {', '.join(SUFFIXES)}",
        code="FJ-DATA-KIND",
    )


def _missing(path: Path, what: str) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        near = "; its folder does not exist either"
    else:
        names = sorted(entry.name for entry in parent.iterdir())
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        shown = close or [name for name in names if name.endswith(SUFFIXES)][:5]
        listed = ", ".join(printable(name, 60) for name in shown)
        near = f"; {'nearest names' if close else 'beside it'}: {listed or 'nothing'}"
    fix = f"check the path{near}"
    return DataError(what, where=str(path), fix=fix, code="FJ-DATA-MISSING")
