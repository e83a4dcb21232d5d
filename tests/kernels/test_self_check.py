"""The check of every op on the device at hand."""

import contextlib
import dataclasses
import functools
import re

import jax
import pytest

from fastjax.config import Implementations
from kernels import self_check
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnknownImplementation, UnsupportedOp
from kernels.programs import all_programs

NF4, RMS_NORM = (op for op in self_check._OPS if op.name in ("nf4", "rms_norm"))


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = dataclasses.replace(self_check._TILE, tokens=8, features=64, inner=64)
    monkeypatch.setattr(self_check, "_TILE", tile)


def test_every_op_that_can_be_named_is_checked() -> None:
    named = {field.name for field in dataclasses.fields(Implementations)}
    chosen = self_check.chosen_for_llama3_8b()
    assert named <= chosen.keys()
    assert set(chosen.values()) == {"xla"}


def test_every_kernel_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    launched = set()
    for op in self_check._OPS:
        run = functools.partial(self_check._results, op, name="mosaic_gpu")
        operands = jax.eval_shape(functools.partial(op.operands, self_check._TILE))
        with (
            assume_compute_capability(HOPPER),
            contextlib.suppress(UnknownImplementation),
        ):
            lowered = jax.jit(run).trace(operands).lower(lowering_platforms=("cuda",))
            launched |= set(
                re.findall(r"dump_basename\\00(\w+?)_\d+\\00", lowered.as_text())
            )
    assert launched >= {name for p in all_programs() for name in p.kernels}


def test_bits_must_be_equal_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_OPS", (NF4,))
    (nf4,) = self_check.check_ops()
    assert (nf4.implementation, nf4.error, nf4.bound) == ("xla", 0, 0)
    assert nf4.is_right


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x, weight, *, implementation):
        if "cudnn" in implementation:
            raise UnsupportedOp("not here")
        y = x * weight[None, None]
        if implementation != "xla":
            return y
        return y + (y - jax.lax.stop_gradient(y))  # the gradient twice

    op = dataclasses.replace(RMS_NORM, call=norm)
    monkeypatch.setattr(self_check, "_OPS", (op,))
    checks = {check.implementation: check for check in self_check.check_ops()}
    assert set(checks) == {"mosaic_gpu", "xla"}
    assert checks["mosaic_gpu"].is_right
    assert not checks["xla"].is_right
    assert not dataclasses.replace(checks["xla"], error=float("nan")).is_right
