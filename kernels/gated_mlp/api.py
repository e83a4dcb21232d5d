"""Gated linear units (arxiv.org/abs/2002.05202), after both projections."""

import jax
from jaxtyping import Array, Float

from kernels import dispatch

from . import reference, vjp

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Known activations, by Hugging Face's names."""


def gated_activation(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "*B F"]:
    """Returns `act(gate) * up`.

    Computes in float32, returns the dtype of the inputs.

    Args:
      gate: Output of the gate projection.
      up: Output of the up projection.
      activation: "silu" (SwiGLU) or "gelu_pytorch_tanh" (GeGLU, tanh form).
      implementation: "xla" or "reference"; None takes the first able.

    Raises:
      ValueError: Unknown activation, or shapes or dtypes disagree.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} must be one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        types = f"{jax.typeof(gate)}, {jax.typeof(up)}"
        raise ValueError(f"gate and up must be alike: {types}")
    return dispatch.run(
        "gated_mlp",
        {"xla": vjp.gated_activation, "reference": reference.gated_activation},
        implementation,
        gate,
        up,
        activation=activation,
    )
