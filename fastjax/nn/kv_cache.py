"""Keys and values of earlier tokens, for decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; slot s holds the token at position s.

    With a leading axis L it is the cache of a whole segment of layers.
    """

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]

    def updated(
        self,
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
    ) -> "LayerCache":
        """Returns the cache with new tokens at their positions.

        A position beyond the cache is dropped, so that padding may point there.
        """
        rows = jnp.broadcast_to(
            jnp.arange(positions.shape[0])[:, None], positions.shape
        )
        return LayerCache(
            self.keys.at[rows, positions].set(keys, mode="drop"),
            self.values.at[rows, positions].set(values, mode="drop"),
        )


KVCache = tuple[LayerCache, ...]


def empty_segment_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> LayerCache:
    """Returns the zeroed cache of `layers` consecutive layers."""
    shape = (layers, batch, slots, kv_heads, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
