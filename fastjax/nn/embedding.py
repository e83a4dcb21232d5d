"""Token embedding, and the head when it has a weight of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.nn.variables import abstract, variable


class Embedding(nnx.Module):
    """A (V, D) table: rows by token id, or logits against all rows."""

    def __init__(
        self, vocabulary: int, features: int, *, dtype: jnp.dtype, is_trainable: bool
    ) -> None:
        table = abstract((vocabulary, features), dtype)
        self.weight = variable(table, is_trainable=is_trainable)

    def __call__(
        self, input_ids: Int[Array, "B T"], *, dtype: jnp.dtype
    ) -> Float[Array, "B T D"]:
        """Returns the row of each token."""
        return self.weight.get_value()[input_ids].astype(dtype)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the float32 products with every row."""
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        return jnp.einsum(
            "...D,VD->...V",
            hidden,
            self.weight.get_value().astype(hidden.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
