"""LoRA products in plain float32, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from kernels.nf4 import NF4Array, dequantize
from kernels.packed import dense

from .dropout import dropped, kept_scale
from .projection import Projection

_EXACT = jax.lax.Precision.HIGHEST


def lora_matmul_group(
    dropout_rate: float,
    x: Float[Array, "M I"],
    projections: tuple[Projection, ...],
    dropout_keys: tuple[PRNGKeyArray | None, ...],
    residual: Float[Array, "M _"] | None,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns the product of each projection, rounded once at the end."""
    own = 0.0 if residual is None else residual.astype(jnp.float32)
    return tuple(
        (own + _project(x.astype(jnp.float32), projection, dropout_rate, key)).astype(
            x.dtype
        )
        for projection, key in zip(projections, dropout_keys, strict=True)
    )


def _project(
    x: Float32[Array, "M I"],
    projection: Projection,
    dropout_rate: float,
    key: PRNGKeyArray | None,
) -> Float32[Array, "M O"]:
    weight = projection.weight
    if isinstance(weight, NF4Array):
        weight = dequantize(weight, implementation="reference")
    weight = jax.lax.stop_gradient(dense(weight, jnp.float32))
    y = jnp.dot(x, weight, precision=_EXACT)
    if projection.lora_a is not None and projection.lora_b is not None:
        scale = jax.lax.stop_gradient(projection.scale)
        a, b = (t.astype(jnp.float32) for t in (projection.lora_a, projection.lora_b))
        xa = jnp.dot(dropped(x, key, dropout_rate), a, precision=_EXACT)
        branch_scale = scale * kept_scale(key, dropout_rate)
        y = y + branch_scale * jnp.dot(xa, b, precision=_EXACT)
        if projection.magnitude is not None:
            merged = weight + scale * jnp.dot(a, b, precision=_EXACT)
            norm = jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=0))
            y = y * (projection.magnitude.astype(jnp.float32) / norm)[None]
    if projection.bias is not None:
        y = y + projection.bias.astype(jnp.float32)[None]
    return y
