"""Scores of the next token at every place of whole rows."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.nn.decoder import Decoder


def next_token_scores(
    decoder: Decoder, ids: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Returns the float32 logits of rows that are one document each."""
    return _scores(*nnx.split(decoder), ids)


@functools.partial(jax.jit, static_argnums=0)
def _scores(graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> jax.Array:
    decoder = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    return decoder.logits(decoder(ids, positions=positions))
