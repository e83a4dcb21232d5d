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
