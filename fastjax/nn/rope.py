"""Rotary position embedding: cosines and sines of given positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.rope_config import RopeConfig
from kernels.rope import rotary_tables


class RotaryEmbedding(nnx.Module):
    """Cosines and sines of each position (2104.09864); holds numbers, no arrays."""

    def __init__(self, head_dim: int, ropes: tuple[RopeConfig, ...]) -> None:
        self.head_dim = head_dim
        self.ropes = ropes

    def __call__(
        self, positions: Int[Array, "B T"], *, context_tokens: int | None = None
    ) -> tuple[Float[Array, "P B T half"], Float[Array, "P B T half"]]:
        """Returns the float32 cosines and sines of `positions`, for each kind of RoPE.

        Args:
          positions: Place in the document, from 0.
          context_tokens: Length that documents count as, where wavelengths depend on
            it; None takes the length of each document in the row.
        """
        tables = [self._tables(rope, positions, context_tokens) for rope in self.ropes]
        cos, sin = zip(*tables, strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def _tables(
        self, rope: RopeConfig, positions: Array, context_tokens: int | None
    ) -> tuple[Array, Array]:
        inv_freq = rope.inverse_frequencies(self.head_dim)
        if not rope.depends_on_length:
            return rotary_tables(positions, inv_freq, scale=rope.attention_factor)
        if context_tokens is None:
            lengths = document_lengths(positions)
        else:
            lengths = jnp.full_like(positions, context_tokens)
        if rope.kind == "dynamic":
            frequencies = _dynamic(rope, self.head_dim, lengths)
        else:
            long = rope.long_inverse_frequencies(self.head_dim)
            is_long = lengths > rope.original_max_position_embeddings
            shape = (*lengths.shape, inv_freq.size)
            frequencies = jnp.where(
                jnp.broadcast_to(is_long[..., None], shape),
                jnp.broadcast_to(jnp.asarray(long)[None, None], shape),
                jnp.broadcast_to(jnp.asarray(inv_freq)[None, None], shape),
            )
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        factor = rope.attention_factor
        return factor * jnp.cos(angles), factor * jnp.sin(angles)


def document_lengths(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns for each token how many tokens its document has.

    A document ends where the next position is not the following number.
    """
    length = positions.shape[1]
    place = jnp.broadcast_to(jnp.arange(length)[None], positions.shape)
    following = jnp.roll(positions, -1, axis=1)
    is_last = (following != positions + 1) | (place == length - 1)
    last = jax.lax.cummin(jnp.where(is_last, place, length), axis=1, reverse=True)
    return positions + 1 + last - place


def _dynamic(
    rope: RopeConfig, head_dim: int, lengths: Int[Array, "B T"]
) -> Float[Array, "B T half"]:
    """Returns frequencies whose base grows with the length beyond the trained one."""
    dim, trained = rope.rotary_dim(head_dim), rope.original_max_position_embeddings
    ratio = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
    growth = (rope.factor * ratio - (rope.factor - 1)) ** (dim / (dim - 2))
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32)[None, None] / dim
    return 1.0 / (rope.theta * growth[..., None]) ** exponents
