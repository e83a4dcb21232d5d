"""Every missing, unexpected and misshapen tensor in one error."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from fastjax.errors import CheckpointMismatch, printable

_MAX_LINES = 50
_LAYER = re.compile(r"\.(\d{1,6})\.")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorReport:
    """How the tensors of a file differ from those that are needed.

    Attributes:
      missing: Needed, not there.
      unexpected: There, not needed.
      misshapen: Name to what is wrong with it.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self, *, where: str, fix: str = "") -> None:
        """Raises `CheckpointMismatch` if there is any difference."""
        lines = [f"missing: {name}" for name in _folded(self.missing)]
        lines += [f"unexpected: {name}" for name in _folded(self.unexpected)]
        lines += [
            f"misshapen: {printable(name)}: {wrong}"
            for name, wrong in self.misshapen.items()
        ]
        if not lines:
            return
        counts = (len(self.missing), len(self.unexpected), len(self.misshapen))
        shown = lines[:_MAX_LINES]
        if len(lines) > _MAX_LINES:
            shown.append(f"and {len(lines) - _MAX_LINES} more")
        raise CheckpointMismatch(
            "tensors do not fit the model: {} missing, {} unexpected, {} misshapen\n"
            "    ".format(*counts)
            + "\n    ".join(shown),
            where=where,
            fix=fix,
        )


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> TensorReport:
    """Returns how the shapes in a file differ from those that are needed."""
    return TensorReport(
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        misshapen={
            name: f"shape {list(found[name])}, the model needs {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        },
    )


def _folded(names: Iterable[str]) -> list[str]:
    """Returns the names, those that differ by layer only as one: `layers.[0-3].x`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = _LAYER.search(name)
        if match:
            key = name[: match.start() + 1], name[match.end() - 1 :]
            layers.setdefault(key, []).append(int(match[1]))
        else:
            layers.setdefault((name, ""), [])
    return [
        printable(before + _ranges(sorted(numbers)) + after)
        for (before, after), numbers in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    text = ",".join(parts)
    return text if len(numbers) <= 1 else f"[{text}]"
