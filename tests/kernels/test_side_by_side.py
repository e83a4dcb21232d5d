"""Kernels that are compiled beside the program they are in."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import jax
import pytest
from jax.experimental.mosaic.gpu import core

from kernels import side_by_side


def wait_for_all() -> None:
    """Waits until all is compiled that was begun, and forgets it."""
    _, pool = side_by_side._begun()
    pool.shutdown()
    side_by_side._begun.cache_clear()


def test_each_kernel_is_compiled_once_from_the_time_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[bytes] = []
    first, last = threading.Event(), threading.Event()

    def compile_one(name: bytes, module: bytes) -> None:
        compiled.append(module)
        (last if name == b"d" else first).set()
        if name == b"broken":
            raise jax.errors.JaxRuntimeError

    known: dict[bytes, bytes] = {}
    monkeypatch.setattr(core, "KNOWN_KERNELS", known)
    monkeypatch.setattr(side_by_side, "_compile", compile_one)
    side_by_side._begun.cache_clear()
    with side_by_side.compiled_side_by_side():  # not on this device
        known[b"a"] = b"A"
    assert not compiled
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with side_by_side.compiled_side_by_side():
        assert first.wait(10)  # while the inside goes on
        known |= {b"b": b"B", b"broken": b"C"}
    with side_by_side.compiled_side_by_side():
        known[b"d"] = b"D"
        assert last.wait(10)
    wait_for_all()
    assert sorted(compiled) == [b"A", b"B", b"C", b"D"]


def test_what_is_done_waits_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    were_left: list[bool] = []
    is_begun, is_left = threading.Event(), threading.Event()

    def compile_one(name: bytes, module: bytes) -> None:
        is_begun.set()
        were_left.append(is_left.wait(10))

    monkeypatch.setattr(core, "KNOWN_KERNELS", {b"a": b"A"})
    monkeypatch.setattr(side_by_side, "_compile", compile_one)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    side_by_side._begun.cache_clear()
    with side_by_side.compiled_side_by_side():
        assert is_begun.wait(10)
    is_left.set()
    wait_for_all()
    assert were_left == [True]


def test_an_interpreter_that_ends_begins_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: list[object] = []
    is_asked = threading.Event()

    class Ended(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *_: Any, **__: Any) -> NoReturn:
            is_asked.set()
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(core, "KNOWN_KERNELS", {b"a": b"A"})
    monkeypatch.setattr(side_by_side, "ThreadPoolExecutor", Ended)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    side_by_side._begun.cache_clear()
    with side_by_side.compiled_side_by_side():
        assert is_asked.wait(10)
    side_by_side._begun.cache_clear()
    assert not failed


def test_what_fails_while_it_is_lowered_waits_for_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[bytes] = []
    first, last, is_shown = (threading.Event() for _ in range(3))

    def compile_one(name: bytes, module: bytes) -> None:
        compiled.append(name)
        (last if name == b"499" else first).set()
        assert is_shown.wait(10)

    known = {str(i).encode(): b"" for i in range(500)}
    monkeypatch.setattr(core, "KNOWN_KERNELS", known)
    monkeypatch.setattr(side_by_side, "_compile", compile_one)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    side_by_side._begun.cache_clear()

    def lower() -> None:
        with side_by_side.compiled_side_by_side():
            assert first.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lower()
    is_shown.set()
    with side_by_side.compiled_side_by_side():
        assert last.wait(10)
    wait_for_all()
    assert sorted(compiled) == sorted(known)  # each once


def test_a_jax_that_hides_its_kernels_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delattr(core, "KNOWN_KERNELS")
    with side_by_side.compiled_side_by_side():
        pass
