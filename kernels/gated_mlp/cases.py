"""Named shapes of the gated activation, shared by tests and benchmarks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedCase:
    """A shape and its activation."""

    name: str
    shape: tuple[int, ...]
    activation: str = "silu"

    def arrays(
        self, dtype: jax.typing.DTypeLike, *, seed: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """Returns random gate and up; the gate reaches both flat ends."""
        rng = np.random.default_rng(seed)
        gate, up = (rng.normal(size=self.shape).astype(np.float32) for _ in range(2))
        return jnp.asarray(4 * gate).astype(dtype), jnp.asarray(up).astype(dtype)


CASES = (
    GatedCase(name="vector", shape=(17,)),
    GatedCase(name="swiglu", shape=(2, 5, 48)),
    GatedCase(name="geglu", shape=(2, 5, 33), activation="gelu_pytorch_tanh"),
)

GPU_CASES = (
    GatedCase(name="llama3_8b", shape=(2, 4096, 14336)),
    GatedCase(name="gemma3_4b", shape=(1, 4096, 10240), activation="gelu_pytorch_tanh"),
)
"""Real shapes."""
