"""What the default device is."""

import functools

import jax


@functools.cache
def compute_capability() -> tuple[int, int] | None:
    """Returns the CUDA compute capability of the default device, None without CUDA."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    text = getattr(device, "compute_capability", "")
    major, _, minor = str(text).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None
