"""What the default device is."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

from .dispatch import UnsupportedOp

Capability = tuple[int, int]

HOPPER: Capability = (9, 0)

_H200_MULTIPROCESSORS = 132

_assumed: contextvars.ContextVar[Capability | None] = contextvars.ContextVar(
    "kernels_assumed_capability", default=None
)


def compute_capability() -> Capability | None:
    """Returns the CUDA compute capability of the default device, None without CUDA."""
    assumed = _assumed.get()
    return _default_device_capability() if assumed is None else assumed


def kind() -> str | None:
    """Returns the name of the default GPU; None without CUDA, or for an assumed one."""
    if _assumed.get() is not None or _default_device_capability() is None:
        return None
    return jax.devices()[0].device_kind


def multiprocessors() -> int:
    """Returns how many the default device has; an H200's when one is assumed."""
    if _assumed.get() is not None:
        return _H200_MULTIPROCESSORS
    return jax.devices()[0].core_count


def require_hopper() -> None:
    """Raises `UnsupportedOp` unless the device can run the Mosaic GPU kernels."""
    capability = compute_capability()
    if capability != HOPPER:
        found = "no CUDA GPU" if capability is None else f"compute {capability}"
        raise UnsupportedOp(
            f"the kernel is written for compute {HOPPER}; found {found}"
        )


@contextlib.contextmanager
def assume_compute_capability(capability: Capability) -> Iterator[None]:
    """Traces as for another device: to interpret kernels or compile them without one.

    JAX's trace caches do not know of the assumption, so jit inside, not outside.
    """
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def _default_device_capability() -> Capability | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    text = getattr(device, "compute_capability", "")
    major, _, minor = str(text).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None
