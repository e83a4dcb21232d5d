"""Named rotary shapes, shared by tests and benchmarks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .tables import rotary_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeCase:
    """A shape, and the length of the documents that each row repeats."""

    name: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    document: int
    scale: float = 1.0

    def arrays(
        self, dtype: jax.typing.DTypeLike, *, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns random q and k, and the tables of their positions."""
        rng = np.random.default_rng(seed)
        q, k = (
            jnp.asarray(
                rng.normal(size=(self.batch, self.tokens, heads, self.head_size)),
                jnp.float32,
            ).astype(dtype)
            for heads in (self.heads, self.kv_heads)
        )
        tables = rotary_tables(self.positions(), self.inv_freq(), scale=self.scale)
        return q, k, *tables

    def positions(self) -> jax.Array:
        """Returns 0 .. document-1, again and again."""
        row = np.arange(self.tokens, dtype=np.int32) % self.document
        return jnp.broadcast_to(row, (self.batch, self.tokens))

    def inv_freq(self) -> np.ndarray:
        """Returns the frequencies of base 10,000."""
        exponents = np.arange(0, self.head_size, 2, dtype=np.float32) / self.head_size
        return (10_000.0**-exponents).astype(np.float32)


CASES = (
    RopeCase(
        name="one_token",
        batch=1,
        tokens=1,
        heads=1,
        kv_heads=1,
        head_size=2,
        document=1,
    ),
    RopeCase(
        name="grouped",
        batch=2,
        tokens=13,
        heads=4,
        kv_heads=2,
        head_size=16,
        document=13,
    ),
    RopeCase(
        name="packed_scaled",
        batch=2,
        tokens=21,
        heads=3,
        kv_heads=1,
        head_size=10,
        document=6,
        scale=1.3,
    ),
)

GPU_CASES = (
    RopeCase(
        name="llama3_8b",
        batch=2,
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        document=1000,
    ),
)
"""Real shapes."""
