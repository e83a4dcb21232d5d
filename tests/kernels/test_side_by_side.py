"""Kernels that are compiled while the program they are in is lowered."""

import threading

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
    first = threading.Event()

    def compile_one(name: bytes, module: bytes) -> None:
        compiled.append(module)
        first.set()
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
    wait_for_all()
    assert sorted(compiled) == [b"A", b"B", b"C", b"D"]


def test_what_fails_while_it_is_lowered_waits_for_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[bytes] = []
    first, is_shown = threading.Event(), threading.Event()

    def compile_one(name: bytes, module: bytes) -> None:
        compiled.append(name)
        first.set()
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
        pass
    wait_for_all()
    assert sorted(compiled) == sorted(known)  # each once


def test_a_jax_that_hides_its_kernels_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delattr(core, "KNOWN_KERNELS")
    with side_by_side.compiled_side_by_side():
        pass
