"""The gated feed-forward network of a layer."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
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
        is_fused: bool,
        activation: Literal["silu", "gelu_pytorch_tanh"],
        implementations: Implementations,
    ) -> None:
        inner = intermediate_size

        def make(name: str, features: int) -> Linear | None:
            if is_fused != (name == "gate_up_proj"):
                return None
            return make_linear(f"mlp.{name}", hidden_size, features, has_bias)

        self.gate_proj = make("gate_proj", inner)
        self.up_proj = make("up_proj", inner)
        self.gate_up_proj = make("gate_up_proj", 2 * inner)
        self.down_proj = make_linear("mlp.down_proj", inner, hidden_size, has_bias)
        self.activation = activation
        self.implementations = implementations

    def __call__(
        self, x: Float[Array, "B T D"], *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the update of each token, from that token alone."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        linears = (self.gate_proj, self.up_proj, self.gate_up_proj)
        rows = project(x, [linear for linear in linears if linear], dropout_key=keys[0])
        gate, up = jnp.split(rows[0], 2, axis=-1) if len(rows) == 1 else rows
        activated = gated_activation(
            checkpoint_name(gate, remat.GATE),
            checkpoint_name(up, remat.UP),
            activation=self.activation,
            implementation=self.implementations.gated_mlp,
        )
        return self.down_proj(activated, dropout_key=keys[1])
