"""The feed-forward half of a layer, and a gradient that keeps nothing but its input."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fastjax.nn.mlp import GatedMLP
from fastjax.nn.norm import RMSNorm, normed_and_input

CHUNK_TOKENS = 8192
"""Most tokens whose gate and up projections `remade_feed_forward` holds at once."""

_TILE_TOKENS = 64  # of the kernels


class FeedForward(NamedTuple):
    """Modules of the half: `x + scale * after(mlp(before(x)))`."""

    before: RMSNorm | None
    mlp: GatedMLP
    after: RMSNorm | None
    scale: float

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states after this half."""
        normed, x = normed_and_input(self.before, x)
        if self.after is None and self.scale == 1.0:
            return self.mlp(normed, dropout_key=dropout_key, residual=x)
        update = self.mlp(normed, dropout_key=dropout_key)
        if self.after is not None:
            update = self.after(update)
        return x + scaled(update, self.scale)


def scaled(update: Float[Array, "B T D"], scale: float) -> Float[Array, "B T D"]:
    """Returns what a half of a layer adds to the residual stream."""
    return update if scale == 1.0 else update * scale


def remade_feed_forward(
    half: FeedForward, x: Float[Array, "B T D"], dropout_key: PRNGKeyArray | None
) -> Float[Array, "B T D"]:
    """Returns `half(x, dropout_key)`; the backward pass makes the inside again.

    Long inputs go through in chunks, so that the inside takes memory for a chunk only.
    """
    return _remade(_static(half, is_handed=False), x, *_weights(half), dropout_key)


def handed_feed_forward(
    half: FeedForward, x: Float[Array, "B T D"], dropout_key: PRNGKeyArray | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns `half(x, dropout_key)` and `x`, without keeping `x`.

    The backward pass is handed `x` in the place of the second result's cotangent, by
    `hand_back`. In a scan the layer after this one does that, so that `x` has the time
    of a whole layer to travel back from the host.
    """
    return _remade(_static(half, is_handed=True), x, *_weights(half), dropout_key)


@jax.custom_vjp
def hand_back(
    hidden: Float[Array, "B T D"], handed: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns `hidden`; keeps what `handed_feed_forward` needs, and hands it over.

    Args:
      hidden: First result of `handed_feed_forward`, or what follows from it.
      handed: Its second result. Its cotangent is its own value.
    """
    del handed
    return hidden


def _hand_back_forward(hidden: Array, handed: Array) -> tuple[Array, Array]:
    return hidden, handed


def _hand_back_backward(handed: Array, dhidden: Array) -> tuple[Array, Array]:
    return dhidden, handed


hand_back.defvjp(_hand_back_forward, _hand_back_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _remade(
    static: Any, x: Array, trained: PyTree, frozen: PyTree, dropout_key: Any
) -> Any:
    def turn(index: Array, chunk: tuple[Array]) -> tuple[Array, Array]:
        key = _key_of(dropout_key, index)
        return index + 1, _half(static, trained, frozen)(*chunk, key)

    out = _by_chunks(turn, jnp.int32(0), (x,))[1]
    return (out, x) if static[-1] else out


def _forward(
    static: Any, x: Array, trained: PyTree, frozen: PyTree, dropout_key: Any
) -> tuple[Any, tuple]:
    results = _remade(static, x, trained, frozen, dropout_key)
    return results, (None if static[-1] else x, trained, frozen, dropout_key)


def _backward(static: Any, residuals: tuple, cotangents: Any) -> tuple:
    x, trained, frozen, dropout_key = residuals
    dout, x = cotangents if static[-1] else (cotangents, x)

    def turn(carry: Any, chunk: tuple[Array, Array]) -> tuple[Any, Array]:
        index, sums = carry
        key = _key_of(dropout_key, index)
        inputs, dout = chunk

        def half(trained: PyTree, x: Array) -> Array:
            return _half(static, trained, frozen)(x, key)

        _, pull = jax.vjp(half, trained, inputs)
        gradients, dx = pull(dout)
        sums = jax.tree.map(jnp.add, sums, gradients)
        # What the gradients read need not be kept while other parts are made again.
        sums, dx = jax.lax.optimization_barrier((sums, dx))
        return (index + 1, sums), dx

    zeros = jax.tree.map(jnp.zeros_like, trained)
    (_, gradients), dx = _by_chunks(turn, (jnp.int32(0), zeros), (x, dout))
    return dx, gradients, None, None


_remade.defvjp(_forward, _backward)


def _static(half: FeedForward, *, is_handed: bool) -> tuple[Any, float, bool]:
    graphdef = nnx.split((half.before, half.mlp, half.after))[0]
    return graphdef, half.scale, is_handed


def _weights(half: FeedForward) -> tuple[PyTree, PyTree]:
    modules = (half.before, half.mlp, half.after)
    _, trained, frozen = nnx.split(modules, nnx.Param, ...)
    return trained, frozen


def _half(static: Any, trained: PyTree, frozen: PyTree) -> FeedForward:
    graphdef, scale, _ = static
    before, mlp, after = nnx.merge(graphdef, trained, frozen)
    return FeedForward(before, mlp, after, scale)


def _key_of(dropout_key: Any, chunk: Array) -> Any:
    """Returns the key of a chunk; the first one's is that of the whole."""
    if dropout_key is None:
        return None
    folded = jax.random.fold_in(dropout_key, chunk)
    return jnp.where(chunk == 0, dropout_key, folded)


def _by_chunks(turn: Any, carry: Any, arrays: tuple[Array, ...]) -> tuple[Any, Array]:
    """Returns the last carry, and the results of all chunks of tokens as one array."""
    *sizes, features = arrays[0].shape
    tokens = math.prod(sizes)
    chunk = chunk_tokens(tokens)
    if chunk == tokens:
        return turn(carry, arrays)
    missing = ((0, -tokens % chunk), (0, 0))
    rows = (jnp.pad(x.reshape(tokens, features), missing) for x in arrays)
    parts = tuple(row.reshape(-1, 1, chunk, features) for row in rows)
    carry, results = jax.lax.scan(turn, carry, parts)
    return carry, results.reshape(-1, features)[:tokens].reshape(arrays[0].shape)


def chunk_tokens(tokens: int) -> int:
    """Returns the size of the chunks that so many tokens are cut into, equal ones.

    The last one is filled up with zeros, so that each consists of whole tiles.
    """
    count = -(-tokens // CHUNK_TOKENS)
    if count == 1:
        return tokens
    return -(-tokens // (count * _TILE_TOKENS)) * _TILE_TOKENS
