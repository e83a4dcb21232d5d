"""Choosing an implementation: order, names, reasons, record."""

import pytest

from kernels import dispatch
from kernels.dispatch import UnsupportedOp


def lacking(value: int) -> int:
    raise UnsupportedOp(f"cannot do {value}")


def double(value: int) -> int:
    return 2 * value


def triple(value: int) -> int:
    return 3 * value


OPS = {"fast": lacking, "good": double, "plain": triple}


def test_none_takes_the_first_able() -> None:
    assert dispatch.run("op", OPS, None, 4) == 8


def test_a_name_is_obeyed() -> None:
    assert dispatch.run("op", OPS, "plain", 4) == 12


def test_a_named_one_never_falls_back() -> None:
    with pytest.raises(UnsupportedOp, match="cannot do 4"):
        dispatch.run("op", OPS, "fast", 4)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'quick'.*fast, good, plain"):
        dispatch.run("op", OPS, "quick", 4)


def test_all_reasons_are_told() -> None:
    with pytest.raises(UnsupportedOp, match=r"a: cannot do 4; b: cannot do 4"):
        dispatch.run("op", {"a": lacking, "b": lacking}, None, 4)


def test_other_errors_pass_through() -> None:
    def broken(value: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dispatch.run("op", {"broken": broken, "good": double}, None, 4)


def test_the_record_holds_what_ran() -> None:
    with dispatch.record() as chosen:
        dispatch.run("op", OPS, None, 1)
        dispatch.run("op", OPS, "plain", 1)
        dispatch.run("other", OPS, None, 1)
        with pytest.raises(UnsupportedOp):
            dispatch.run("failed", OPS, "fast", 1)
    dispatch.run("late", OPS, None, 1)
    assert chosen == {"op": {"good", "plain"}, "other": {"good"}}


def test_records_nest() -> None:
    with dispatch.record() as outer:
        with dispatch.record() as inner:
            dispatch.run("op", OPS, None, 1)
        dispatch.run("other", OPS, None, 1)
    assert inner == {"op": {"good"}}
    assert outer == {"other": {"good"}}
