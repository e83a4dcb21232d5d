"""The gated feed-forward network of a layer."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax import remat
from fastjax.config import Implementations
from fastjax.nn.linear import Linear, project
from kernels.gated_mlp import gated_activation


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU or GeGLU (2002.05202)."""

    def __init__(
        self,
        make_linear: Callable[[str, int, int, bool], Linear],
        *,
        hidden_size: int,
        intermediate_size: int,
        has_bias: bool,
        activation: Literal["silu", "gelu_pytorch_tanh"],
        implementations: Implementations,
    ) -> None:
        inner = intermediate_size
        self.gate_proj = make_linear("mlp.gate_proj", hidden_size, inner, has_bias)
        self.up_proj = make_linear("mlp.up_proj", hidden_size, inner, has_bias)
        self.down_proj = make_linear("mlp.down_proj", inner, hidden_size, has_bias)
        self.activation = activation
        self.implementations = implementations

    def __call__(
        self, x: Float[Array, "B T D"], *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the update of each token, from that token alone."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        gate, up = project(x, (self.gate_proj, self.up_proj), dropout_key=keys[0])
        activated = gated_activation(
            checkpoint_name(gate, remat.GATE),
            checkpoint_name(up, remat.UP),
            activation=self.activation,
            implementation=self.implementations.gated_mlp,
        )
        return self.down_proj(activated, dropout_key=keys[1])
