"""Attention tile by tile (arxiv.org/abs/2205.14135), memory linear in length.

One scan runs over the pairs of query and key tiles that causality and a static window
leave; its accumulators are updated in place. A pair that documents, `q_index` or a
traced window hide wholly is skipped at run time. Sums run in one fixed order, so
results are deterministic, and masked tokens add exact zeros.
"""

import einops
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from .xla_tiles import (
    Options,
    Pair,
    Placement,
    State,
    grouped,
    make_tiles,
    over_pairs,
    pad,
    put,
    take,
    take_pair,
    ungrouped,
    unless_hidden,
)


def attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    placement: Placement,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B K G T"]]:
    """Returns the output and the log-sum-exp of the scores, 0 where no key is seen."""
    tiles = make_tiles(q, k, v, placement, options)

    def visit(state: State, row: Array, col: Array) -> State:
        pair = take_pair(tiles, row, col, options.window)
        old = tuple(take(x, row, tiles.size_q, axis=3) for x in state)
        new = unless_hidden(
            tiles, pair.mask, lambda old: _online_softmax(old, pair, options), old
        )
        return tuple(put(x, y, row, axis=3) for x, y in zip(state, new, strict=True))

    lowest = jnp.full(tiles.q.shape[:4], -jnp.inf, jnp.float32)
    state = (lowest, jnp.zeros_like(lowest), jnp.zeros(tiles.q.shape, jnp.float32))
    top, total, out = over_pairs(tiles, visit, state)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, top + jnp.log(total), 0.0)
    out = ungrouped(out / total[..., None], q.shape[1])
    return out.astype(q.dtype), lse[..., : q.shape[1]]


def attention_backward(
    residuals: tuple[Array, Array, Array, Array, Array],
    dout: Float[Array, "B T N H"],
    placement: Placement,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns dq, dk, dv from (q, k, v, out, lse); probabilities are recomputed."""
    q, k, v, out, lse = residuals
    tiles = make_tiles(q, k, v, placement, options)
    by_row = tuple(
        pad(x, tiles.q.shape[3], axis=3)
        for x in (grouped(dout, k.shape[2]), lse, _delta(out, dout, k.shape[2]))
    )

    def visit(state: State, row: Array, col: Array) -> State:
        pair = take_pair(tiles, row, col, options.window)
        rows = tuple(take(x, row, tiles.size_q, axis=3) for x in by_row)
        old = (
            take(state[0], row, tiles.size_q, axis=3),
            take(state[1], col, tiles.size_k, axis=2),
            take(state[2], col, tiles.size_k, axis=2),
        )
        new = unless_hidden(
            tiles, pair.mask, lambda old: _add_gradients(old, pair, rows, options), old
        )
        return (
            put(state[0], new[0], row, axis=3),
            put(state[1], new[1], col, axis=2),
            put(state[2], new[2], col, axis=2),
        )

    state = tuple(jnp.zeros(x.shape, jnp.float32) for x in (tiles.q, tiles.k, tiles.v))
    dq, dk, dv = over_pairs(tiles, visit, state)
    dk, dv = (jnp.swapaxes(x[:, :, : k.shape[1]], 1, 2) for x in (dk, dv))
    dq = ungrouped(dq, q.shape[1])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _online_softmax(old: State, pair: Pair, options: Options) -> State:
    """Returns (maximum, sum, weighted values) with one more key tile in them."""
    top, total, out = old
    scores = jnp.where(pair.mask, _scores(pair, options), -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(top - shift)
    values = _matmul("BKGTS,BKSH->BKGTH", weights.astype(pair.v.dtype), pair.v)
    return (
        new_top,
        decay * total + weights.sum(axis=-1),
        decay[..., None] * out + values,
    )


def _add_gradients(old: State, pair: Pair, rows: State, options: Options) -> State:
    """Returns (dq, dk, dv) of the tiles with this pair's share added."""
    dout, lse, delta = rows
    scores = _scores(pair, options)
    weights = jnp.exp(jnp.where(pair.mask, scores, -jnp.inf) - lse[..., None])
    dweights = _matmul("BKGTH,BKSH->BKGTS", dout, pair.v)
    dscores = options.scale * weights * (dweights - delta[..., None])
    if options.softcap is not None:
        dscores = dscores * (1.0 - jnp.square(scores / options.softcap))
    weights, dscores = weights.astype(pair.v.dtype), dscores.astype(pair.q.dtype)
    return (
        old[0] + _matmul("BKGTS,BKSH->BKGTH", dscores, pair.k),
        old[1] + _matmul("BKGTS,BKGTH->BKSH", dscores, pair.q),
        old[2] + _matmul("BKGTS,BKGTH->BKSH", weights, dout),
    )


def _scores(pair: Pair, options: Options) -> Float32[Array, "B K G T S"]:
    scores = options.scale * _matmul("BKGTH,BKSH->BKGTS", pair.q, pair.k)
    if options.softcap is None:
        return scores
    return options.softcap * jnp.tanh(scores / options.softcap)


def _delta(
    out: Float[Array, "B T N H"], dout: Float[Array, "B T N H"], heads: int
) -> Float32[Array, "B K G T"]:
    """Returns `sum(out * dout)`, the mean of dweights under the weights."""
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    return einops.rearrange(delta, "B T (K G) -> B K G T", K=heads)


def _matmul(letters: str, a: Array, b: Array) -> Array:
    """Returns the float32 product; float32 inputs are not rounded on the way."""
    exact = a.dtype == jnp.float32
    return jnp.einsum(
        letters,
        a,
        b,
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
