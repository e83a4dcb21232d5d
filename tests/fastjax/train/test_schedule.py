"""Schedules have the values of transformers.optimization at every step."""

import math

import numpy as np
import pytest

from fastjax.config import OptimizerConfig, Schedule
from fastjax.train.schedule import make_schedule, warmup_steps

TOTAL, WARMUP, PEAK = 20, 5.0, 2e-4


def expected(kind: str, step: int) -> float:
    """The lambdas of transformers, written out in float64."""
    if kind == "constant":
        return 1.0
    if step < WARMUP:
        return step / max(1, WARMUP)
    done = (step - WARMUP) / max(1, TOTAL - WARMUP)
    cosine = max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * done)))
    return {
        "linear": max(0.0, (TOTAL - step) / max(1, TOTAL - WARMUP)),
        "cosine": cosine,
        "constant_with_warmup": 1.0,
        "cosine_with_min_lr": cosine * 0.9 + 0.1,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"],
)
def test_values(kind: Schedule) -> None:
    config = OptimizerConfig(
        learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=WARMUP
    )
    schedule = make_schedule(config, TOTAL)
    actual = [float(schedule(step)) for step in range(TOTAL + 1)]
    wanted = [PEAK * expected(kind, step) for step in range(TOTAL + 1)]
    np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-12)


def test_no_warmup_starts_at_the_peak() -> None:
    schedule = make_schedule(
        OptimizerConfig(learning_rate=PEAK, warmup_steps=0.0), TOTAL
    )
    assert float(schedule(0)) == pytest.approx(PEAK)
    assert float(schedule(TOTAL)) == 0.0


@pytest.mark.parametrize(
    ("given", "steps"), [(0.0, 0), (0.03, 3), (0.031, 4), (0.5, 50), (1.0, 1), (7.0, 7)]
)
def test_warmup_is_steps_or_a_share(given: float, steps: int) -> None:
    assert warmup_steps(OptimizerConfig(warmup_steps=given), 100) == steps


def test_a_share_of_one_step_leaves_the_peak() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, warmup_steps=0.03), 1)
    assert float(schedule(0)) == pytest.approx(PEAK)
