"""Which implementation is the default: the one that was fastest where it was timed.

`tuned/<device>.json`, written by `scripts/tune_kernels.py`, holds the milliseconds of
the implementations of an op on cases. A case that was not timed takes the order of the
nearest one that was.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import device

Case = Mapping[str, int | str]
"""What the speed of an op depends on: sizes as numbers, kinds as words."""

FOLDER = Path(__file__).parent / "tuned"


def fastest_first(
    op: str, case: Case, implementations: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `implementations` in the order in which the default is looked for.

    The table is that of the present device, or else of a device of the same compute
    capability. Its nearest case has the same words and the nearest numbers, by ratio.
    The timed implementations come first, the fastest before all; the others follow as
    they were written. Without a table or such a case all stay as they were written.

    Args:
      op: As given to `dispatch.run`.
      case: Of this call; the same keys as in the op's programs.
      implementations: Name to function, best first for all that is known without
        measuring.
    """
    milliseconds = _nearest(_table().get(op, ()), case)
    timed = [name for name in milliseconds if name in implementations]
    timed.sort(key=milliseconds.__getitem__)
    return {name: implementations[name] for name in (*timed, *implementations)}


def table_name(device_kind: str) -> str:
    """Returns the file name of a device's table: `nvidia_h200.json`."""
    return "_".join(device_kind.lower().split()) + ".json"


def write_rows(
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


def write_table(
    path: Path, header: Mapping[str, Any], choices: Iterable[Mapping[str, Any]]
) -> None:
    """Writes a device's table, or what was measured anew of it.

    Args:
      path: The table.
      header: Holds "compute_capability".
      choices: Of "op", "case", "ms", which maps implementations to milliseconds, and
        what else is to stand beside them.
    """
    write_rows(path, header, choices, name="choices", keys=("op", "case"))


def _table() -> dict[str, list[dict]]:
    """Returns op -> choices of the present device."""
    kind, capability = device.kind(), device.compute_capability()
    if kind is not None and (FOLDER / table_name(kind)).exists():
        return _read(FOLDER / table_name(kind))
    for path in sorted(FOLDER.glob("*.json")):
        if capability is not None and _capability_of(path) == capability:
            return _read(path)
    return {}


@functools.cache
def _read(path: Path) -> dict[str, list[dict]]:
    table: dict[str, list[dict]] = {}
    for choice in json.loads(path.read_text())["choices"]:
        table.setdefault(choice["op"], []).append(choice)
    return table


@functools.cache
def _capability_of(path: Path) -> tuple[int, ...]:
    return tuple(json.loads(path.read_text())["compute_capability"])


def _nearest(choices: Iterable[dict], case: Case) -> dict[str, float]:
    """Returns the times of the nearest case, nothing where none is comparable."""
    best, times = math.inf, {}
    for choice in choices:
        apart = _distance(choice["case"], case)
        if apart < best:
            best, times = apart, choice["ms"]
    return times


def _distance(one: Case, other: Case) -> float:
    """Returns how far apart two cases are, infinity where they cannot be compared."""
    if one.keys() != other.keys():
        return math.inf
    total = 0.0
    for key, value in one.items():
        another = other[key]
        if isinstance(value, str) or isinstance(another, str):
            total += 0 if value == another else math.inf
        else:
            total += abs(math.log(max(value, 1) / max(another, 1)))
    return total
