"""Errors of kernels and devices, told as users can act on them."""

import contextlib
from collections.abc import Iterator

import jax

from fastjax.errors import EnvironmentFault, OutOfMemory
from kernels.dispatch import UnsupportedOp


@contextlib.contextmanager
def device_faults(action: str, *, memory_fix: str) -> Iterator[None]:
    """Turns what kernels and devices raise into errors with a way out.

    Args:
      action: What the device does, such as "generate".
      memory_fix: What helps when it runs out of memory.

    Raises:
      EnvironmentFault: The named implementation cannot run here.
      OutOfMemory: The device's memory is full.
    """
    try:
        yield
    except UnsupportedOp as error:
        raise EnvironmentFault(
            f"cannot {action} here: {error}",
            fix="leave --implementation out: the first able one runs",
            code="FJ-ENV-KERNEL",
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(
            f"the device has too little memory to {action}",
            where=str(error).splitlines()[0][:200],
            fix=memory_fix,
        ) from error
