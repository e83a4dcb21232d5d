"""Writes what was measured: the files of benchmarks, and the tables of `choice`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_results(
    path: Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Writes the rows of a benchmark, in the place of all earlier ones of its programs.

    Args:
      path: The file.
      header: What is the same for all rows.
      rows: Of plain values; "program" names the program.
    """
    _write_rows(path, header, rows, name="results", keys=("program",))


def write_table(
    path: Path, header: Mapping[str, Any], choices: Iterable[Mapping[str, Any]]
) -> None:
    """Writes a device's table for `choice`, or what was measured anew of it.

    Args:
      path: The table.
      header: Holds "compute_capability".
      choices: Of "op", "case", "ms", which maps implementations to milliseconds, and
        what else is to stand beside them.
    """
    _write_rows(path, header, choices, name="choices", keys=("op", "case"))


def _write_rows(
    path: Path,
    header: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    keys: tuple[str, ...],
) -> None:
    """Writes measured rows, one a line; those that are not measured again stay.

    Whoever is stopped meanwhile leaves the file as it was.

    Args:
      path: The file.
      header: What is the same for all rows.
      rows: Of plain values.
      name: What the file calls its rows.
      keys: Rows that agree in these are replaced; the first one sorts them.
    """

    def case(row: Mapping[str, Any]) -> list[Any]:
        return [row[key] for key in keys]

    given = list(rows)
    known = json.loads(path.read_text())[name] if path.exists() else []
    cases = [case(row) for row in given]
    kept = [row for row in known if case(row) not in cases]
    in_order = sorted([*kept, *given], key=lambda row: row[keys[0]])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in in_order)
    head = json.dumps(dict(header), indent=1).removesuffix("\n}")
    whole = path.with_name(path.name + ".new")
    whole.write_text(f'{head},\n "{name}": [\n{lines}\n ]\n}}\n')
    whole.replace(path)
