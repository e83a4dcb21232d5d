"""`loss.svg`: the training loss, raw and smoothed, and the evaluations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjax import files

NAME = "loss.svg"
Points = list[tuple[float, float]]
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 44
_MOST_POINTS = 1500
_SPAN = 20
"""Share of the records, 1 / 20, over which the average forgets."""


def write_loss_plot(output_dir: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes the plot of the records of `metrics.jsonl`; none without a loss.

    Raises:
      StorageError: The file cannot be written.
    """
    image = loss_svg(records)
    if image:
        with files.storage_errors(f"write {NAME}", output_dir):
            files.write_atomic(output_dir / NAME, image)


def loss_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the plot as SVG, empty when there is nothing to draw."""
    train = _points(records, "loss")
    evals = _points(records, "eval_loss")
    if not train and not evals:
        return ""
    axes = _Axes([*train, *evals])
    parts = [axes.grid()]
    if train:
        parts += [
            axes.line(_thinned(train), "#9ecae1", 1),
            axes.line(_thinned(smoothed(train)), "#1f6fb2", 2),
        ]
    if evals:
        parts += [axes.line(evals, "#d95f02", 2), axes.dots(evals, "#d95f02")]
    legend = [("#9ecae1", "loss"), ("#1f6fb2", "smoothed"), ("#d95f02", "eval_loss")]
    parts += [
        f'<text x="{_LEFT + 120 * i}" y="22" fill="{color}">{name}</text>'
        for i, (color, name) in enumerate(legend)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def smoothed(points: Points) -> Points:
    """Returns the exponential average, corrected for its start at nothing."""
    keep = 1 - 1 / max(1, len(points) / _SPAN)
    result, average, weight = [], 0.0, 0.0
    for step, value in points:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append((step, average / weight))
    return result


class _Axes:
    """Maps steps and losses to places in the image."""

    def __init__(self, points: Points) -> None:
        steps, values = [x for x, _ in points], [y for _, y in points]
        self._x = (min(steps), max(max(steps), min(steps) + 1))
        margin = 0.05 * (max(values) - min(values)) or 0.5
        self._y = (min(values) - margin, max(values) + margin)

    def line(self, points: Points, color: str, width: int) -> str:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._place, points))
        return (
            f'<polyline points="{places}" fill="none" stroke="{color}" '
            f'stroke-width="{width}"/>'
        )

    def dots(self, points: Points, color: str) -> str:
        return "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            for x, y in map(self._place, points)
        )

    def grid(self) -> str:
        parts = []
        for value in _ticks(*self._y):
            y = self._place((self._x[0], value))[1]
            parts.append(
                f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{value:.4g}</text>"
            )
        for step in _ticks(*self._x):
            x = self._place((step, self._y[0]))[0]
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">'
                f"{step:g}</text>"
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
        )
        return "".join(parts)

    def _place(self, point: tuple[float, float]) -> tuple[float, float]:
        (x, y), (left, right), (low, high) = point, self._x, self._y
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        across = (x - left) / (right - left)
        return _LEFT + across * width, _TOP + (high - y) / (high - low) * height


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers between two others."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]


def _points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [
        (float(record["step"]), float(record[name]))
        for record in records
        if record.get(name) is not None and math.isfinite(record[name])
    ]


def _thinned(points: Points) -> Points:
    every = max(1, len(points) // _MOST_POINTS)
    return [*points[:-1:every], points[-1]]
