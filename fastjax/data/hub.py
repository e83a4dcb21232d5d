"""Data sets of the Hugging Face hub, by name."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import is_offline_mode

from fastjax.data.files import is_data_file_name
from fastjax.errors import DataError, EnvironmentFault, printable

_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(\[(?P<split>[^\]]+)\])?"
)
_COPY = (
    "or copy the files here from a machine with a network (hf download --repo-type "
    "dataset NAME --local-dir FOLDER) and give --dataset_name FOLDER"
)


def is_hub_name(source: str) -> bool:
    """Tells whether `source` is a name of the hub, and no path.

    Names are "owner/name", "owner/name:config" and "owner/name[split]".
    """
    found = _NAME.fullmatch(source)
    if found is None or source.startswith("."):
        return False
    return not os.path.exists(Path(source).parent) and not is_data_file_name(source)


def hub_rows(name: str, *, split: str, streaming: bool = False) -> Iterable[object]:
    """Returns the rows of a hub data set, downloaded or from the cache.

    Args:
      name: As in `is_hub_name`; a split in it wins.
      split: Which rows; "train[:10%]" takes a part of a split.
      streaming: Reads rows as they come, without downloading the set first.

    Raises:
      DataError: The hub cannot be reached, or it lacks the data set or split.
      EnvironmentFault: The library `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        fix = "pip install datasets, or give a file"
        raise EnvironmentFault("data sets of the hub need datasets", fix=fix) from error
    found = _NAME.fullmatch(name)
    assert found is not None
    chosen = found["split"] or split
    with _hub_faults(name):
        rows = load_dataset(
            found["repo"], found["config"], split=chosen, streaming=streaming
        )
    return _read(rows, name)


def _read(rows: Iterable[object], name: str) -> Iterator[object]:
    """Yields the rows; a connection may end on the way."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except (OSError, ValueError) as error:
        raise DataError(
            f"the rows end early: {printable(error, 300)}",
            where=f"{printable(name)}, after row {count}",
            fix=f"if the connection broke, run it again; {_COPY}",
            code="FJ-DATA-HUB",
        ) from error


@contextlib.contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    retries = logging.getLogger("huggingface_hub.utils._http")
    level = retries.level
    retries.setLevel(logging.ERROR)  # It tells of every attempt, and the error does.
    try:
        yield
    except ConnectionError as error:
        where, fix = "", "check the network and HF_ENDPOINT"
        if is_offline_mode():
            where, fix = "HF_HUB_OFFLINE is set", "unset it"
        raise DataError(
            f"the Hugging Face hub cannot be reached, and {printable(name)} is neither "
            "a file nor in the cache",
            where=where or printable(error, 300),
            fix=f"{fix}; {_COPY}",
            code="FJ-DATA-HUB",
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"no such file, and the hub does not give it: {printable(error, 300)}",
            where=printable(name),
            fix="check the name, the split and HF_HUB_OFFLINE; a configuration is "
            "named as owner/name:config, a split as owner/name[split]; a gated one "
            "needs `hf auth login`",
            code="FJ-DATA-HUB",
        ) from error
    finally:
        retries.setLevel(level)
