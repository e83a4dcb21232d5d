"""RMSNorm, arxiv.org/abs/1910.07467, for activations of any rank."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.choice import fastest_first

from . import reference, vjp


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """Returns `x / sqrt(mean(x²) + eps) * (offset + weight)`, means over D.

    Computes in float32, returns the dtype of `x`. The weight gradient is accumulated
    in float32 and returned in the dtype of `weight`.

    Args:
      x: Activations.
      weight: Gain of each feature.
      eps: Added to the mean square.
      offset: 1.0 for families whose checkpoints store the gain less one.
      implementation: "mosaic_gpu", "xla" or "reference"; None takes the fastest able.

    Raises:
      ValueError: The sizes disagree.
      UnsupportedOp: The named implementation cannot run these shapes here.
    """
    _check(x, weight)
    return dispatch.run(
        "rms_norm",
        _implementations("rms_norm", x, vjp.rms_norm, reference.rms_norm),
        implementation,
        x,
        weight,
        eps=eps,
        offset=offset,
    )


def add_rms_norm(
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"] | None,
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns (`rms_norm(total)`, `total`) where `total = x + residual`.

    The sum is rounded to the dtype of `x` before it is normalised, so that the pair
    equals an addition followed by `rms_norm`; see there for the arguments. Without a
    residual `total` is `x`: what reads it then sends its gradient through the norm's
    one pass, in place of an addition afterwards.

    Raises:
      ValueError: The sizes or dtypes disagree.
      UnsupportedOp: The named implementation cannot run these shapes here.
    """
    _check(x, weight)
    if residual is not None and not _alike(x, residual):
        types = f"{jax.typeof(x)}, {jax.typeof(residual)}"
        raise ValueError(f"x and residual must be alike: {types}")
    return dispatch.run(
        "add_rms_norm",
        _implementations("add_rms_norm", x, vjp.add_rms_norm, reference.add_rms_norm),
        implementation,
        x,
        residual,
        weight,
        eps=eps,
        offset=offset,
    )


def _alike(x: Array, residual: Array) -> bool:
    return x.shape == residual.shape and x.dtype == residual.dtype


def _implementations(
    op: str, x: Array, wired: Callable[..., Any], in_jnp: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Returns name to function, the default for this `x` first."""
    best_first = {
        "mosaic_gpu": functools.partial(wired, vjp.MOSAIC_GPU),
        "xla": functools.partial(wired, vjp.XLA),
        "reference": in_jnp,
    }
    return fastest_first(op, {"features": x.shape[-1]}, best_first)


def _check(x: Array, weight: Array) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{weight.shape=} must be the last axis of {x.shape=}")
