"""Named RMSNorm shapes, shared by tests and benchmarks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class RMSNormCase:
    """A shape: leading axes, features, and the offset of the gain."""

    name: str
    leading: tuple[int, ...]
    features: int
    offset: float = 0.0
    eps: float = 1e-6

    def arrays(
        self, dtype: jax.typing.DTypeLike, *, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns random x, residual and weight."""
        rng = np.random.default_rng(seed)
        shape = (*self.leading, self.features)
        x, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        gain = 1 - self.offset + 0.1 * rng.normal(size=self.features)
        weight = jnp.asarray(gain.astype(np.float32))
        return (
            jnp.asarray(3 * x).astype(dtype),
            jnp.asarray(residual).astype(dtype),
            weight.astype(dtype),
        )


CASES = (
    RMSNormCase(name="vector", leading=(), features=33),
    RMSNormCase(name="rows", leading=(7,), features=64),
    RMSNormCase(name="tokens", leading=(2, 5), features=96, eps=1e-5),
    RMSNormCase(name="heads", leading=(2, 5, 3), features=16),
    RMSNormCase(name="offset", leading=(2, 5), features=40, offset=1.0),
)

INTERPRETED_CASES = (
    RMSNormCase(name="one_feature_a_thread", leading=(3,), features=128),
    RMSNormCase(name="three_runs", leading=(2, 2), features=768, offset=1.0),
    RMSNormCase(name="runs_of_eight", leading=(2,), features=1024, eps=1e-5),
)
"""Small ones that the Mosaic GPU kernels can run."""

GPU_CASES = (
    RMSNormCase(name="llama3_8b", leading=(2, 4096), features=4096, eps=1e-5),
    RMSNormCase(name="qwen3_8b_heads", leading=(2, 4096, 32), features=128),
    RMSNormCase(name="gemma3_4b_heads", leading=(2, 4096, 8), features=256, offset=1.0),
    RMSNormCase(name="qwen2_05b", leading=(2, 4096), features=896),
    RMSNormCase(name="llama3_1b", leading=(2, 4096), features=2048, eps=1e-5),
    RMSNormCase(name="qwen2_7b", leading=(2, 4096), features=3584),
    RMSNormCase(name="llama3_70b", leading=(1, 4096), features=8192, eps=1e-5),
    RMSNormCase(name="gemma3_4b", leading=(1, 4096), features=2560, offset=1.0),
)
"""Real shapes."""
