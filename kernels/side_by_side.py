"""Compiles Mosaic GPU kernels on all cores while the program they are in is compiled.

XLA compiles the kernels of a program one after the other, which for a training step
is most of its time, and it does so after its passes over the program. Mosaic keeps what
is compiled for the whole process, by a hash of the kernel: what was compiled here, XLA
then finds. Each kernel is a program of its own, so that JAX's compilation cache keeps
it for other steps as well.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

_TARGET = "mosaic_gpu_v2"
_LOOK_SECONDS = 0.02
_LOCK = threading.Lock()


@contextlib.contextmanager
def compiled_side_by_side() -> Iterator[None]:
    """Compiles the kernels of the program that the inside lowers and compiles.

    Most are done when XLA asks for the first one, seconds after it begins; what is not
    it compiles itself, and tells of a kernel that cannot be compiled. On a GPU alone,
    and where this JAX has its table of kernels: without, only time is lost. Where the
    inside fails, nothing is begun any more.
    """
    known = _known_kernels() if jax.default_backend() == "gpu" else None
    if known is None:
        yield
        return
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(known, is_over))
    watcher.start()
    is_done = False
    try:
        yield
        is_done = True
    finally:
        is_over.set()
        watcher.join()  # it waits for no kernel
        if not is_done:
            _forget_waiting()


def _known_kernels() -> Mapping[bytes, bytes] | None:
    """Returns the kernels lowered so far, by hash; None where JAX hides them."""
    from jax.experimental.mosaic.gpu import core

    return getattr(core, "KNOWN_KERNELS", None)


def _watch(known: Mapping[bytes, bytes], is_over: threading.Event) -> None:
    """Begins to compile what appears among the known kernels, until it is over."""
    while not is_over.wait(_LOOK_SECONDS):
        _begin(known)


def _forget_waiting() -> None:
    """Takes back what no thread compiles yet; a later program begins it."""
    with _LOCK:
        begun, _ = _begun()
        for name, future in tuple(begun.items()):
            if future.cancel():
                del begun[name]


def _begin(known: Mapping[bytes, bytes]) -> None:
    """Begins to compile each kernel that nobody has begun.

    Once in a process, which keeps what is compiled.
    """
    with _LOCK:
        begun, pool = _begun()
        for name, module in tuple(known.items()):
            if name in begun:
                continue
            try:
                begun[name] = pool.submit(_compile, name, module)
            except RuntimeError:  # the interpreter ends
                return


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
