"""RMS normalisation (1910.07467)."""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fastjax import remat
from fastjax.nn.variables import abstract, variable
from kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nnx.Module):
    """Scales each vector to unit root mean square, then by a weight per feature."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        offset: float = 0.0,
        dtype: jnp.dtype,
        is_trainable: bool = False,
        implementation: str | None = None,
    ) -> None:
        self.weight = variable(abstract((features,), dtype), is_trainable=is_trainable)
        self.eps = eps
        self.offset = offset
        self.implementation = implementation

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normalised `x`; the statistics are float32."""
        return rms_norm(
            x,
            self.weight.get_value(),
            eps=self.eps,
            offset=self.offset,
            implementation=self.implementation,
        )

    def and_input(
        self, x: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Returns the normalised `x`, and `x` for what adds to it.

        The gradients of the two meet in the norm's one pass.
        """
        return add_rms_norm(
            x,
            None,
            self.weight.get_value(),
            eps=self.eps,
            offset=self.offset,
            implementation=self.implementation,
        )


def normed_and_input(
    norm: RMSNorm | None, x: Float[Array, "*B D"]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns `norm.and_input(x)`, or `x` twice where there is no norm."""
    if norm is None:
        return x, x
    normed, x = norm.and_input(x)
    return checkpoint_name(normed, remat.NORMED), x
