"""Data sets of the Hugging Face hub, by name."""

import re
from collections.abc import Iterable
from pathlib import Path

from fastjax.errors import DataError, printable

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


def is_hub_name(source: str) -> bool:
    """Tells whether `source` is "owner/name" or "owner/name:config", and no path."""
    found = _NAME.fullmatch(source)
    if found is None or source.startswith("."):
        return False
    path = Path(source)
    is_file_name = path.suffix.lower() in (".json", ".jsonl", ".ndjson", ".csv", ".txt")
    return not path.parent.exists() and not is_file_name


def hub_rows(name: str, *, split: str) -> Iterable[object]:
    """Returns the rows of a hub data set, downloaded or from the cache.

    Raises:
      DataError: The hub cannot be reached, or it lacks the data set or split.
    """
    from datasets import load_dataset

    found = _NAME.fullmatch(name)
    assert found is not None
    try:
        return load_dataset(found["repo"], found["config"], split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no such file, and the hub does not give it: {printable(error, 300)}",
            where=printable(name),
            fix="check the name, the split and HF_HUB_OFFLINE; a configuration is "
            "named as owner/name:config; a gated one needs `hf auth login`",
            code="FJ-DATA-HUB",
        ) from error
