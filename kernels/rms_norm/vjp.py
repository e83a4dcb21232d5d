"""Gradient of RMSNorm, wired for each implementation.

Saved: the normalised input (for `add_rms_norm` that is the sum, an output anyway) and
the weight: 2 D bytes a token in bf16. Recomputed: the reciprocal root, one reduction.
The weight gradient is summed over tokens in float32, and only where one is asked for.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from . import mosaic_gpu, mosaic_gpu_vjp, reference, rows, xla


@dataclass(frozen=True, kw_only=True)
class Passes:
    """An implementation: what it refuses, its two forwards and its backward."""

    check: Callable[[Array, Array], None]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    gradients: Callable[..., Any]


XLA = Passes(
    check=lambda x, weight: None,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    gradients=xla.gradients,
)
MOSAIC_GPU = Passes(
    check=rows.check,
    rms_norm=mosaic_gpu.rms_norm,
    add_rms_norm=mosaic_gpu.add_rms_norm,
    gradients=mosaic_gpu_vjp.gradients,
)


def rms_norm(
    passes: Passes,
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float,
) -> Float[Array, "*B D"]:
    """Returns RMSNorm with the gradient of `passes`; see `api.rms_norm`."""
    passes.check(x, weight)
    return _rms_norm(passes, x, weight, eps, offset)


def add_rms_norm(
    passes: Passes,
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"] | None,
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns (norm, sum) with the gradient of `passes`; see `api.add_rms_norm`."""
    passes.check(x, weight)
    return _add_rms_norm(passes, x, residual, weight, eps, offset)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "weight"],
    meta_fields=["wants_dweight", "is_sum"],
)
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclass(frozen=True)
class _Saved:
    """What the backward needs: the normalised input, the weight, who has gradients."""

    x: Array
    weight: Array
    wants_dweight: bool
    is_sum: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _rms_norm(
    passes: Passes, x: Array, weight: Array, eps: float, offset: float
) -> Array:
    return passes.rms_norm(x, weight, eps=eps, offset=offset)


def _forward(
    passes: Passes, x: Any, weight: Any, eps: float, offset: float
) -> tuple[Array, _Saved]:
    out = passes.rms_norm(x.value, weight.value, eps=eps, offset=offset)
    return out, _Saved(x.value, weight.value, weight.perturbed)


def _backward(
    passes: Passes, eps: float, offset: float, saved: _Saved, dout: Any
) -> tuple[Array, Array | None]:
    return _gradients(passes, saved, dout, None, eps, offset)


def _norm_and_sum(
    passes: Passes,
    x: Array,
    residual: Array | None,
    weight: Array,
    eps: float,
    offset: float,
) -> tuple[Array, Array]:
    if residual is None:
        return passes.rms_norm(x, weight, eps=eps, offset=offset), x
    return passes.add_rms_norm(x, residual, weight, eps=eps, offset=offset)


_add_rms_norm = jax.custom_vjp(_norm_and_sum, nondiff_argnums=(0, 4, 5))


def _add_forward(
    passes: Passes, x: Any, residual: Any, weight: Any, eps: float, offset: float
) -> tuple[tuple[Array, Array], _Saved]:
    added = None if residual is None else residual.value
    norm, total = _norm_and_sum(passes, x.value, added, weight.value, eps, offset)
    return (norm, total), _Saved(
        total, weight.value, weight.perturbed, is_sum=added is not None
    )


def _add_backward(
    passes: Passes, eps: float, offset: float, saved: _Saved, cotangents: Any
) -> tuple[Array, Array | None, Array | None]:
    dnorm, dtotal = cotangents
    dtotal = None if isinstance(dtotal, SymbolicZero) else dtotal
    dx, dweight = _gradients(passes, saved, dnorm, dtotal, eps, offset)
    return dx, dx if saved.is_sum else None, dweight


def _gradients(
    passes: Passes,
    saved: _Saved,
    dout: Any,
    dtotal: Array | None,
    eps: float,
    offset: float,
) -> tuple[Array, Array | None]:
    """Returns dx and dweight as JAX wants them: None stands for zero."""
    x, weight = saved.x, saved.weight
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(x)
    dx, dweight = passes.gradients(
        x,
        weight,
        dout,
        dtotal,
        eps=eps,
        offset=offset,
        wants_dweight=saved.wants_dweight,
    )
    return dx, None if dweight is None else dweight.astype(weight.dtype)


_rms_norm.defvjp(_forward, _backward, symbolic_zeros=True)
_add_rms_norm.defvjp(_add_forward, _add_backward, symbolic_zeros=True)
