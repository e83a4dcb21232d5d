"""The gated feed-forward network of a layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from fastjax.config import Implementations
from fastjax.nn.linear import Linear, adapter_dropout, project
from kernels.gated_mlp import gated_activation, gated_mlp, unit_of


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
        self,
        x: Float[Array, "B T D"],
        *,
        dropout_key: PRNGKeyArray | None = None,
        residual: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the update of each token, from that token alone, plus a residual."""
        linears = (self.gate_proj, self.up_proj, self.gate_up_proj)
        inner = [linear for linear in linears if linear is not None]
        if isinstance(self.down_proj.weight, nnx.Param):
            return self._trained_weights(x, inner, residual)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        rate, inner_keys = adapter_dropout(inner, keys[0])
        down_rate, down_keys = adapter_dropout((self.down_proj,), keys[1])
        return gated_mlp(
            x,
            tuple(linear.projection() for linear in inner),
            self.down_proj.projection(),
            activation=self.activation,
            residual=residual,
            dropout_rate=max(rate, down_rate),
            dropout_keys=(*inner_keys, *down_keys),
            implementation=self.implementations.gated_mlp,
            product_implementation=self.down_proj.implementation,
        )

    def _trained_weights(
        self,
        x: Float[Array, "B T D"],
        inner: Sequence[Linear],
        residual: Float[Array, "B T D"] | None,
    ) -> Float[Array, "B T D"]:
        """Does as a call where weights themselves have gradients."""
        unit = functools.partial(
            gated_activation, implementation=self.implementations.gated_mlp
        )
        rows = project(x, inner)
        return self.down_proj(
            unit_of(unit, rows, activation=self.activation), residual=residual
        )
