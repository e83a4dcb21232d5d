"""Attention forward by the Hopper kernel, backward by cuDNN, for rows not packed.

cuDNN's backward computes five products where the two kernels of `mosaic_gpu_vjp`
compute seven, unless they keep gradients of scores; the forward kernel is the faster
one. What is saved is as in `flash`.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels.dispatch import UnsupportedOp

from . import cudnn
from .flash import row_visits, visited_attention
from .visits import Visits
from .vjp import RESIDUAL_NAMES


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B S"] | None,
    max_segments: int | None,
    visits: Visits | None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention by the kernel with cuDNN's gradient; see `api.attention`.

    Raises:
      UnsupportedOp: One of the two lacks this case, or there is no such device.
    """
    if segment_ids is not None and max_segments != 1:
        raise UnsupportedOp("no packed rows")
    cudnn.require_gradient()
    if visits is None or segment_ids is not None:
        # Padding has its lse from causality alone here: cuDNN's backward reads it.
        visits = row_visits(
            q, segment_ids=None, window=options["window"], has_softcap=False
        )
    return cudnn.attention(
        q,
        k,
        v,
        segment_ids=segment_ids,
        max_segments=max_segments,
        causal=functools.partial(_causal, visits),
        **options,
    )


def _causal(
    visits: Visits, q: Array, k: Array, v: Array, scale: float, window: int | None
) -> Array:
    return _attention(q, k, v, visits, scale, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: Array, k: Array, v: Array, visits: Visits, scale: float, window: int | None
) -> Array:
    return _forward(q, k, v, visits, scale, window)[0]


def _forward(
    q: Array, k: Array, v: Array, visits: Visits, scale: float, window: int | None
) -> tuple[Array, tuple[Array, ...]]:
    del window  # the visits know it
    results = visited_attention(q, k, v, visits, scale=scale)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return out, (q, k, v, out, lse)


def _backward(
    scale: float, window: int | None, residuals: tuple[Array, ...], dout: Array
) -> tuple[Array, Array, Array, None]:
    return *cudnn.causal_gradient(residuals, dout, scale, window), None


_attention.defvjp(_forward, _backward)
