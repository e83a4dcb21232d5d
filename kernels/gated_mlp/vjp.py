"""Gradient of the gated activation.

Saved: gate and up, 4 F bytes a token in bf16. Recomputed: the activation and its slope,
in float32, inside the one fused loop that writes both gradients.
"""

import functools

import jax
from jaxtyping import Array, Float

from . import reference

RESIDUAL_NAMES = ("gate", "up")
"""What the network's backward pass reads of it, for `jax.checkpoint` policies."""


def gated_activation(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, activation: str
) -> Float[Array, "*B F"]:
    """Returns `act(gate) * up` with the gradient of this file."""
    return _gated(gate, up, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(gate: Array, up: Array, activation: str) -> Array:
    return reference.gated_activation(gate, up, activation=activation)


def _forward(
    gate: Array, up: Array, activation: str
) -> tuple[Array, tuple[Array, Array]]:
    out = reference.gated_activation(gate, up, activation=activation)
    return out, (gate, up)


def _backward(
    activation: str, residuals: tuple[Array, Array], dout: Array
) -> tuple[Array, Array]:
    op = functools.partial(reference.gated_activation, activation=activation)
    _, pullback = jax.vjp(op, *residuals)
    return pullback(dout)


_gated.defvjp(_forward, _backward)
