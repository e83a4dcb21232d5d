"""Gated activation in plain jnp: the definition of correct."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gated_activation(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, activation: str
) -> Float[Array, "*B F"]:
    """Returns `act(gate) * up`."""
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    if activation == "silu":
        active = jax.nn.silu(gate32)
    else:
        active = jax.nn.gelu(gate32, approximate=True)
    return (active * up32).astype(gate.dtype)
