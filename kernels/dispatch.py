"""Chooses the implementation of an op and records the choice."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

_RECORD: contextvars.ContextVar[dict[str, set[str]] | None] = contextvars.ContextVar(
    "kernels_dispatch_record", default=None
)


class UnsupportedOp(NotImplementedError):
    """An implementation cannot run these shapes, dtypes or this device."""


class UnknownImplementation(ValueError):
    """No implementation of the op has the name that was given."""


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    named: str | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns the result of the named implementation, or of the first able one.

    Its instructions carry the op's name, by which profiles tell ops apart.

    Args:
      op: Name of the op, for messages and for the record.
      implementations: Name to function, best first. A function raises
        `UnsupportedOp` for what it lacks.
      named: Runs that one or fails; None tries each in turn.
      *args: Passed on.
      **kwargs: Passed on.

    Raises:
      UnknownImplementation: None has that name.
      UnsupportedOp: The named one, or every one, cannot run this case.
    """
    if named is not None:
        if named not in implementations:
            known = ", ".join(implementations)
            raise UnknownImplementation(
                f"{op} has no implementation {named!r}; it has: {known}"
            )
        with jax.named_scope(op):
            result = implementations[named](*args, **kwargs)
        _note(op, named)
        return result
    reasons = []
    for name, function in implementations.items():
        try:
            with jax.named_scope(op):
                result = function(*args, **kwargs)
        except UnsupportedOp as error:
            reasons.append(f"{name}: {error}")
            continue
        _note(op, name)
        return result
    raise UnsupportedOp(f"no implementation of {op} can run: {'; '.join(reasons)}")


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
    """Yields a dict that fills with op -> implementations chosen while tracing."""
    chosen: dict[str, set[str]] = {}
    token = _RECORD.set(chosen)
    try:
        yield chosen
    finally:
        _RECORD.reset(token)


def _note(op: str, name: str) -> None:
    chosen = _RECORD.get()
    if chosen is not None:
        chosen.setdefault(op, set()).add(name)
