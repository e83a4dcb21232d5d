"""Named shapes of the gated activation and of the network, for tests and benchmarks."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkCase:
    """Sizes of a network, and what its projections carry.

    `ranks` has an entry for each projection, that back the last; two of them are of a
    merged one. 0 is a projection without adapter.
    """

    name: str
    rows: int
    inputs: int
    features: int
    ranks: tuple[int, ...] = (16, 16, 16)
    activation: str = "silu"
    is_quantized: bool = True
    has_bias: bool = False
    has_residual: bool = True


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

NETWORKS = (
    NetworkCase(
        name="bias", rows=40, inputs=24, features=32, ranks=(4, 0, 4), has_bias=True
    ),
    NetworkCase(
        name="merged",
        rows=20,
        inputs=24,
        features=16,
        ranks=(4, 4),
        is_quantized=False,
        has_residual=False,
        activation="gelu_pytorch_tanh",
    ),
)

INTERPRETED_NETWORKS = (
    NetworkCase(
        name="packed",
        rows=128,
        inputs=256,
        features=256,
        ranks=(4, 0, 4),
        has_bias=True,
    ),
    NetworkCase(
        name="dense",
        rows=128,
        inputs=128,
        features=256,
        ranks=(0, 0, 0),
        is_quantized=False,
        activation="gelu_pytorch_tanh",
    ),
    NetworkCase(name="rank_32", rows=128, inputs=128, features=128, ranks=(32, 32, 32)),
    NetworkCase(
        name="large_ranks",
        rows=128,
        inputs=128,
        features=128,
        ranks=(136, 64, 136),
        is_quantized=False,
    ),
)
"""Small ones that the Mosaic GPU kernels can run.

The second adds beside a product. The ranks of the last two are too large for one kernel
or another: `unit_cotangents`, and then `gated_unit_product` and `low_rank_cotangents`.
"""

GPU_NETWORKS = (
    NetworkCase(name="llama3_8b", rows=8192, inputs=4096, features=14336),
    NetworkCase(name="llama3_8b_2048", rows=2048, inputs=4096, features=14336),
    NetworkCase(
        name="gemma3_4b",
        rows=4096,
        inputs=2560,
        features=10240,
        activation="gelu_pytorch_tanh",
        has_residual=False,
    ),
)
"""Real shapes."""
