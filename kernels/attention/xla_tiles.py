"""Cuts attention by XLA into tiles, and says which pairs of tiles to visit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .mask import visible

_TILE_TOKENS = 512
_NEVER_SEEN = int(np.iinfo(np.int32).max)

type State = tuple[Array, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is known while tracing.

    Attributes:
      scale: Of the scores.
      softcap: Bound of the scores, or None.
      window: Tokens seen, if that is a plain integer; None otherwise.
      in_order: Query i stands at index i of its row.
    """

    scale: float
    softcap: float | None
    window: int | None
    in_order: bool


class Placement(NamedTuple):
    """Where queries and keys stand; a pytree, any of it may be traced.

    Attributes:
      q_index: Row index of each query: (B, T), or (1, T) if all rows agree.
      k_index: Row index of each key: (S,).
      q_segment_ids: Document of each query: (B, T), or None.
      segment_ids: Document of each key: (B, S), or None.
      window: Scalar, if traced; None otherwise.
    """

    q_index: Array
    k_index: Array
    q_segment_ids: Array | None
    segment_ids: Array | None
    window: Array | None


class Tiles(NamedTuple):
    """Arrays of (B, K, G, T, H) and (B, K, S, H), padded to whole tiles."""

    q: Array
    k: Array
    v: Array
    placement: Placement
    size_q: int
    size_k: int
    pairs: np.ndarray
    may_skip: bool


class Pair(NamedTuple):
    """One query tile against one key tile."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    mask: Bool[Array, "#B 1 1 T S"]


def make_tiles(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    placement: Placement,
    options: Options,
) -> Tiles:
    """Returns tiles of at most 512 queries and 512² scores a head.

    A row that fits one tile is not padded. Padding sees nothing and is not seen.
    """
    size_q = _even_size(q.shape[1], _TILE_TOKENS)
    size_k = _even_size(k.shape[1], _TILE_TOKENS**2 // size_q)
    pairs = _visited_pairs(q.shape[1], k.shape[1], size_q, size_k, options)
    t = size_q * _tile_count(q.shape[1], size_q)
    s = size_k * _tile_count(k.shape[1], size_k)
    segments = placement.segment_ids
    q_segments = placement.q_segment_ids
    return Tiles(
        q=pad(grouped(q, k.shape[2]), t, axis=3),
        k=pad(jnp.swapaxes(k, 1, 2), s, axis=2),
        v=pad(jnp.swapaxes(v, 1, 2), s, axis=2),
        placement=Placement(
            q_index=pad(placement.q_index, t, axis=1, value=-1),
            k_index=pad(placement.k_index, s, axis=0, value=_NEVER_SEEN),
            q_segment_ids=None if q_segments is None else pad(q_segments, t, axis=1),
            segment_ids=None if segments is None else pad(segments, s, axis=1),
            window=placement.window,
        ),
        size_q=size_q,
        size_k=size_k,
        pairs=pairs,
        may_skip=len(pairs) > 1
        and not (options.in_order and segments is None and placement.window is None),
    )


def take_pair(tiles: Tiles, row: Array, col: Array, window: int | None) -> Pair:
    """Returns query tile `row`, key tile `col` and the mask between them."""
    where = tiles.placement
    q_segments, segments = where.q_segment_ids, where.segment_ids
    mask = visible(
        take(where.q_index, row, tiles.size_q, axis=1),
        take(where.k_index, col, tiles.size_k, axis=0),
        q_segment_ids=None
        if q_segments is None
        else take(q_segments, row, tiles.size_q, axis=1),
        segment_ids=None
        if segments is None
        else take(segments, col, tiles.size_k, axis=1),
        window=where.window if window is None else window,
    )
    return Pair(
        q=take(tiles.q, row, tiles.size_q, axis=3),
        k=take(tiles.k, col, tiles.size_k, axis=2),
        v=take(tiles.v, col, tiles.size_k, axis=2),
        mask=mask[:, None, None],
    )


def over_pairs(
    tiles: Tiles, visit: Callable[[State, Array, Array], State], state: State
) -> State:
    """Returns the state after every pair of tiles, in a fixed order."""
    if len(tiles.pairs) == 1:
        return visit(state, *jnp.asarray(tiles.pairs[0]))

    def step(state: State, pair: Array) -> tuple[State, None]:
        return visit(state, pair[0], pair[1]), None

    return lax.scan(step, state, jnp.asarray(tiles.pairs))[0]


def unless_hidden(
    tiles: Tiles, mask: Array, update: Callable[[State], State], old: State
) -> State:
    """Returns `update(old)`, or `old` at no cost where the whole mask is False."""
    if not tiles.may_skip:
        return update(old)
    return lax.cond(jnp.any(mask), update, lambda same: same, old)


def take(x: Array, index: Array, size: int, axis: int) -> Array:
    """Returns tile `index`."""
    if x.shape[axis] == size:
        return x
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def put(x: Array, tile: Array, index: Array, axis: int) -> Array:
    """Returns `x` with tile `index` replaced."""
    size = tile.shape[axis]
    if x.shape[axis] == size:
        return tile
    return lax.dynamic_update_slice_in_dim(x, tile, index * size, axis)


def pad(x: Array, size: int, *, axis: int, value: int = 0) -> Array:
    """Returns `x` grown to `size` along `axis`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def grouped(x: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K G T H"]:
    """Returns query heads beside the key head that they share, tokens inside."""
    return einops.rearrange(x, "B T (K G) H -> B K G T H", K=heads)


def ungrouped(
    x: Float[Array, "B K G padded H"], tokens: int
) -> Float[Array, "B T N H"]:
    """Returns the first `tokens` of each row, heads inside."""
    return einops.rearrange(x[:, :, :, :tokens], "B K G T H -> B T (K G) H")


def _even_size(tokens: int, largest: int) -> int:
    """Returns the tile size that pads least among those with the fewest tiles."""
    return _tile_count(tokens, _tile_count(tokens, largest))


def _tile_count(tokens: int, size: int) -> int:
    return -(-tokens // size)


def _visited_pairs(
    q_tokens: int, k_tokens: int, size_q: int, size_k: int, options: Options
) -> np.ndarray:
    """Returns (row, col) of the pairs that causality and a static window leave."""
    rows, cols = np.mgrid[
        : _tile_count(q_tokens, size_q), : _tile_count(k_tokens, size_k)
    ]
    pairs = np.stack([rows.ravel(), cols.ravel()], axis=1).astype(np.int32)
    if not options.in_order:
        return pairs
    first_q, first_k = pairs[:, 0] * size_q, pairs[:, 1] * size_k
    last_q, last_k = first_q + size_q - 1, first_k + size_k - 1
    seen = first_k <= last_q
    if options.window is not None:
        seen &= first_q - last_k < options.window
    return pairs[seen]
