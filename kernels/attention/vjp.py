"""Attention by XLA, tile by tile, and its gradient.

Saved: q, k, v, the output (as many bytes as q) and the log-sum-exp, 4 bytes a query
and head. Recomputed: the probabilities, a tile at a time. For Llama 3 8B in bf16 that
is 20.6 KB a token and layer, of which the output and the log-sum-exp are 8.3 KB.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .xla import attention_backward, attention_forward
from .xla_tiles import Options, Placement

RESIDUAL_NAMES = ("attention_out", "attention_lse")
"""Names under which `jax.checkpoint` policies see what "xla" saves beside q, k, v."""

SAVED_PRIMITIVES = frozenset(
    {"dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"}
)
"""Names of the primitives whose outputs are what "cudnn" saves beside q, k, v."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_index: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B S"] | None,
    q_segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    softcap: float | None,
    scale: float,
    max_segments: int | None,
) -> Float[Array, "B T N H"]:
    """Returns tiled attention with the gradient of this file; see `api.attention`."""
    del max_segments
    static_window = window if isinstance(window, int) else None
    in_order = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    placement = Placement(
        q_index=in_order if q_index is None else q_index.astype(jnp.int32),
        k_index=jnp.arange(k.shape[1], dtype=jnp.int32),
        q_segment_ids=q_segment_ids,
        segment_ids=segment_ids,
        window=None if isinstance(window, int) else window,
    )
    options = Options(
        scale=scale, softcap=softcap, window=static_window, in_order=q_index is None
    )
    return _attention(q, k, v, placement, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q: Array, k: Array, v: Array, placement: Placement, options: Options
) -> Array:
    return attention_forward(q, k, v, placement, options)[0]


def _forward(
    q: Array, k: Array, v: Array, placement: Placement, options: Options
) -> tuple[Array, tuple]:
    results = attention_forward(q, k, v, placement, options)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return out, (q, k, v, out, lse, placement)


def _backward(options: Options, residuals: tuple, dout: Array) -> tuple:
    *arrays, placement = residuals
    return *attention_backward(tuple(arrays), dout, placement, options), None


_attention.defvjp(_forward, _backward)
