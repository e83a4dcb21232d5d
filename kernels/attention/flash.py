"""Attention by the kernels for Hopper: what they refuse, and their gradient.

Saved: q, k, v, the output and the log-sum-exp, 4 bytes a query and head, under the
names of `vjp.RESIDUAL_NAMES`, and which keys each query sees, 8 bytes, unless all
layers share them. Recomputed: the weights, by one kernel of the backward or by both.
Rows are padded to whole blocks.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from kernels.device import require_hopper
from kernels.dispatch import UnsupportedOp

from .mosaic_gpu import attention_forward
from .mosaic_gpu_dscores import MAX_BYTES, all_bytes
from .mosaic_gpu_vjp import attention_backward
from .mosaic_tiles import TileConfig, tile_config
from .spans import Spans, causal_spans
from .visits import Visits, visits_of
from .vjp import RESIDUAL_NAMES

_DTYPES = (jnp.bfloat16, jnp.float16)
_MAX_ELEMENTS = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashOptions:
    """What is known while tracing.

    Attributes:
      scale: Of the scores.
      softcap: Bound of the scores, or None.
      tiles: Blocks of the kernels.
      keeps_dscores: Gradients of scores stay in memory; `dscores_bytes` allows it.
    """

    scale: float
    softcap: float | None
    tiles: TileConfig
    keeps_dscores: bool


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
    visits: Visits | None,
    keeps_dscores: bool,
) -> Float[Array, "B T N H"]:
    """Returns attention by the Hopper kernels; see `api.attention`.

    Raises:
      UnsupportedOp: The kernels lack this case, or there is no such device.
    """
    del max_segments
    if q_index is not None or q.shape[1] != k.shape[1]:
        raise UnsupportedOp("queries must be those of the whole row, in order")
    if q_segment_ids is not segment_ids:
        raise UnsupportedOp("documents of queries and keys must be the same array")
    if visits is None:
        visits = row_visits(
            q, segment_ids=segment_ids, window=window, has_softcap=softcap is not None
        )
    return visited_attention(
        q, k, v, visits, scale=scale, softcap=softcap, keeps_dscores=keeps_dscores
    )[0]


def row_visits(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
    *,
    segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    has_softcap: bool,
) -> Visits:
    """Returns the visits of rows that attend to themselves.

    Raises:
      UnsupportedOp: The kernels lack the head size, or there is no such device.
    """
    require_hopper()
    batch, tokens, _, head_size = q.shape
    tiles = tile_config(head_size, has_softcap=has_softcap)
    spans = causal_spans(batch, tokens, tokens, segment_ids=segment_ids, window=window)
    return visits_of(spans, tokens, tiles)


def dscores_bytes(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct, *, softcap: float | None = None
) -> int:
    """Returns what the kernels hold more while they compute a gradient.

    These are the gradients of the scores, if they may be kept; 0 where they are not.
    They grow with the square of the row.
    """
    size = _all_dscores_bytes(q, softcap)
    return size if size <= MAX_BYTES else 0


def most_dscores_bytes(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct, *, softcap: float | None = None
) -> int:
    """Returns no less than `dscores_bytes` is of such rows and of shorter ones."""
    return min(_all_dscores_bytes(q, softcap), MAX_BYTES)


def _all_dscores_bytes(q: Array | jax.ShapeDtypeStruct, softcap: float | None) -> int:
    """Returns those of whole blocks; 0 where the kernels do not store them."""
    try:
        tiles = tile_config(q.shape[3], has_softcap=softcap is not None)
    except UnsupportedOp:
        return 0
    if q.dtype not in _DTYPES:
        return 0
    batch, tokens, heads, head_size = q.shape
    whole = (batch, tokens + -tokens % tiles.tokens, heads, head_size)
    return all_bytes(jax.ShapeDtypeStruct(whole, q.dtype), tiles)


def chunk_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Returns attention over the keys of a span a query, and its log-sum-exp.

    The queries and the keys may be chunks of longer rows: `causal_spans` takes their
    offsets, and the log-sum-exps weigh the outputs of several chunks of keys. Both
    results have their gradient.

    Raises:
      UnsupportedOp: The kernels lack this case, or there is no such device.
    """
    tiles = tile_config(q.shape[3], has_softcap=softcap is not None)
    visits = visits_of(spans, k.shape[1], tiles)
    return visited_attention(q, k, v, visits, scale=scale, softcap=softcap)


def visited_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visits: Visits,
    *,
    scale: float,
    softcap: float | None = None,
    keeps_dscores: bool = False,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Does as `chunk_attention`, with visits made before."""
    _check(q, k, scale)
    tiles = tile_config(q.shape[3], has_softcap=softcap is not None)
    options = FlashOptions(
        scale=scale, softcap=softcap, tiles=tiles, keeps_dscores=keeps_dscores
    )
    return _attention(q, k, v, visits, options)


def _check(q: Array, k: Array, scale: float) -> None:
    require_hopper()
    if q.dtype not in _DTYPES:
        raise UnsupportedOp(f"{q.dtype=} must be bfloat16 or float16")
    if scale <= 0:
        raise UnsupportedOp(f"{scale=} must be above 0")
    if not 0 < q.size < _MAX_ELEMENTS or not 0 < k.size < _MAX_ELEMENTS:
        raise UnsupportedOp(f"{q.shape=}, {k.shape=} must hold 1 .. 2**31 - 1 elements")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q: Array, k: Array, v: Array, visits: Visits, options: FlashOptions
) -> tuple[Array, Array]:
    return _padded_forward(q, k, v, visits, options)


def _padded_forward(
    q: Array, k: Array, v: Array, visits: Visits, options: FlashOptions
) -> tuple[Array, Array]:
    tokens = q.shape[1]
    q, k, v = _whole_blocks((q, k, v), options.tiles)
    out, lse = attention_forward(
        q,
        k,
        v,
        visits,
        scale=options.scale,
        softcap=options.softcap,
        tiles=options.tiles,
    )
    return out[:, :tokens], lse[:, :, :tokens]


def _forward(
    q: Array, k: Array, v: Array, visits: Visits, options: FlashOptions
) -> tuple[tuple[Array, Array], tuple]:
    results = _padded_forward(q, k, v, visits, options)
    out, lse = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out, lse), (q, k, v, out, lse, visits)


def _backward(
    options: FlashOptions, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    q, k, v, out, lse, visits = residuals
    dout, dlse = cotangents
    products = out.astype(jnp.float32) * dout.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=3), 1, 2) - dlse
    q_tokens, k_tokens = q.shape[1], k.shape[1]
    q, k, v, dout = _whole_blocks((q, k, v, dout), options.tiles)
    lse, delta = _whole_blocks((lse, delta), options.tiles, axis=2)
    dq, dk, dv = attention_backward(
        (q, k, v, dout),
        (lse, delta),
        visits,
        scale=options.scale,
        softcap=options.softcap,
        tiles=options.tiles,
        keeps_dscores=options.keeps_dscores,
    )
    return dq[:, :q_tokens], dk[:, :k_tokens], dv[:, :k_tokens], None


_attention.defvjp(_forward, _backward)


def _whole_blocks(
    arrays: tuple[Array, ...], tiles: TileConfig, axis: int = 1
) -> tuple[Array, ...]:
    """Returns the arrays with zeros up to a multiple of the blocks along an axis."""
    padded = []
    for x in arrays:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % tiles.tokens)
        padded.append(jnp.pad(x, widths) if widths[axis][1] else x)
    return tuple(padded)
