"""Kernels that are compiled while the program they are in is lowered."""

import threading

import jax
import pytest
from jax.experimental.mosaic.gpu import core

from kernels import side_by_side


def test_each_kernel_is_compiled_once_before_the_inside_is_left(
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
    assert sorted(compiled) == [b"A", b"B", b"C", b"D"]
    side_by_side._begun.cache_clear()
