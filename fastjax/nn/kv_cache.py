"""Keys and values of earlier tokens, for decoding."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclasses.dataclass(frozen=True)
class SegmentCache:
    """Keys and values of consecutive layers; slot s holds the token at position s.

    The scan over layers carries it whole, so that the compiler writes new tokens in
    place: as inputs and outputs of the scan all layers would be copied for each token.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer of a segment's cache."""

    segment: SegmentCache
    layer: Int[Array, ""]

    @property
    def keys(self) -> Float[Array, "B S K H"]:
        """Keys of this layer."""
        return jax.lax.dynamic_index_in_dim(
            self.segment.keys, self.layer, keepdims=False
        )

    @property
    def values(self) -> Float[Array, "B S K H"]:
        """Values of this layer."""
        return jax.lax.dynamic_index_in_dim(
            self.segment.values, self.layer, keepdims=False
        )

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
        place = (self.layer, rows, positions)
        segment = SegmentCache(
            self.segment.keys.at[place].set(keys, mode="drop"),
            self.segment.values.at[place].set(values, mode="drop"),
        )
        return LayerCache(segment, self.layer)


KVCache = tuple[SegmentCache, ...]


def empty_segment_cache(
    shape: tuple[int, int, int, int, int], dtype: jnp.dtype
) -> SegmentCache:
    """Returns the zeroed cache (L, B, S, K, H) of consecutive layers."""
    return SegmentCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
