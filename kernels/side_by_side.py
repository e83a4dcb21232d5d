"""Compiles Mosaic GPU kernels on all cores while the program they are in is lowered.

XLA compiles the kernels of a program one after the other, which for a training step
is most of its time. Mosaic keeps what is compiled for the whole process, by a hash of
the kernel: what was compiled here, XLA then finds. Each kernel is a program of its
own, so that JAX's compilation cache keeps it for other steps as well.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp

_TARGET = "mosaic_gpu_v2"
_LOOK_SECONDS = 0.02
_LOCK = threading.Lock()


@contextlib.contextmanager
def compiled_side_by_side() -> Iterator[None]:
    """Compiles the kernels that the inside lowers; they are ready when it is left.

    On a GPU alone. A kernel that cannot be compiled XLA will tell of.
    """
    if jax.default_backend() != "gpu":
        yield
        return
    from jax.experimental.mosaic.gpu import core

    is_lowered = threading.Event()
    watcher = threading.Thread(target=_watch, args=(core.KNOWN_KERNELS, is_lowered))
    watcher.start()
    try:
        yield
    finally:
        is_lowered.set()
        watcher.join()


def _watch(known: Mapping[bytes, bytes], is_lowered: threading.Event) -> None:
    """Compiles what appears among the known kernels, by hash, until all is lowered."""
    while not is_lowered.wait(_LOOK_SECONDS):
        _begin(known)
    wait(_begin(known))


def _begin(known: Mapping[bytes, bytes]) -> list[Future[None]]:
    """Begins to compile each kernel that nobody has begun; returns all of them.

    Once in a process: a kernel compiled again would take the place of one in use.
    """
    with _LOCK:
        begun, pool = _begun()
        for name, module in tuple(known.items()):
            if name not in begun:
                begun[name] = pool.submit(_compile, name, module)
        return [*begun.values()]


@functools.cache
def _begun() -> tuple[dict[bytes, Future[None]], ThreadPoolExecutor]:
    return {}, ThreadPoolExecutor(thread_name_prefix="compile-kernels")


def _compile(name: bytes, module: bytes) -> None:
    """Compiles a program that calls the kernel; it takes nothing, as it never runs."""
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((), jnp.float32))

    def program() -> jax.Array:
        return call(
            kernel_hash=name,
            module=module,
            use_custom_barrier=False,
            skip_device_barrier=False,
            uses_xla_collective_metadata=False,
        )

    jax.jit(program).lower().compile()
