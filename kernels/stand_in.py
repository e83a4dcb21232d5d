"""Says in plain jnp what a piece of hand-written machine code computes."""

from collections.abc import Callable
from typing import Any

_ATTRIBUTE = "kernels_stand_in"


def stand_in(
    in_jnp: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator for the function given to `plgpu.inline_mgpu`.

    The interpreter (`kernels.interpret`) calls `in_jnp` instead, with the same
    arguments less the launch context; a reference argument arrives as its value.
    """

    def mark(machine_code: Callable[..., Any]) -> Callable[..., Any]:
        setattr(machine_code, _ATTRIBUTE, in_jnp)
        return machine_code

    return mark


def stand_in_of(machine_code: Callable[..., Any]) -> Callable[..., Any] | None:
    """Returns what `stand_in` attached, None where nothing was."""
    return getattr(machine_code, _ATTRIBUTE, None)
