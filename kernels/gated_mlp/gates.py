"""The activation and its slope inside of kernels.

Both activations are `gate * sigmoid(z)` with a polynomial z: the gate itself for silu,
and, because 0.5 (1 + tanh(y)) = sigmoid(2 y), an odd one of degree three for the tanh
form of gelu (arxiv.org/abs/1606.08415).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

_LOG2_E = math.log2(math.e)
_GELU = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class Gates(NamedTuple):
    """Of a gate g.

    Attributes:
      active: `act(g)`.
      slope: `act'(g)`.
    """

    active: Float32[Array, "M F"]
    slope: Float32[Array, "M F"]


def gates(gate: Float32[Array, "M F"], activation: str) -> Gates:
    """Returns `act(gate)` and its slope."""
    is_silu = activation == "silu"
    square = gate * gate
    z = gate if is_silu else gate * (_GELU + _GELU * _CUBIC * square)
    share = _sigmoid(z)
    active = gate * share
    rest = active - active * share
    if not is_silu:
        rest = rest * (_GELU + 3 * _GELU * _CUBIC * square)
    return Gates(active, share + rest)


def _sigmoid(z: jax.Array) -> jax.Array:
    # A reciprocal would be a division, of ten instructions; this is one.
    root = lax.rsqrt(1 + jnp.exp2(-_LOG2_E * z))
    return root * root
