"""Token embedding, and the head when it has a weight of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.nn.variables import LoRAParam, abstract, variable


def with_rows(
    table: Float[Array, "V D"], tokens: tuple[int, ...], rows: Float[Array, "R D"]
) -> Float[Array, "V D"]:
    """Returns the table with other rows for some tokens."""
    return table.at[jnp.asarray(tokens)].set(rows.astype(table.dtype))


class Embedding(nnx.Module):
    """A (V, D) table: rows by token id, or logits against all rows.

    Attributes:
      weight: The table.
      tokens: Tokens that have a row of their own, beside the table.
      rows: These rows, which train in float32; None without any.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        dtype: jnp.dtype,
        is_trainable: bool,
        tokens: tuple[int, ...] = (),
    ) -> None:
        table = abstract((vocabulary, features), dtype)
        self.weight = variable(table, is_trainable=is_trainable)
        self.tokens = tokens
        rows = abstract((len(tokens), features), jnp.dtype(jnp.float32))
        self.rows = LoRAParam(rows) if tokens else None

    def __call__(
        self, input_ids: Int[Array, "B T"], *, dtype: jnp.dtype
    ) -> Float[Array, "B T D"]:
        """Returns the row of each token."""
        x = self.weight.get_value()[input_ids].astype(dtype)
        if self.rows is None:
            return x
        tokens = jnp.asarray(self.tokens, input_ids.dtype)[None, None, :]
        is_token = input_ids[..., None] == tokens
        own = self.rows.get_value()[jnp.argmax(is_token, axis=-1)].astype(dtype)
        return jnp.where(jnp.any(is_token, axis=-1, keepdims=True), own, x)

    def table(self) -> Float[Array, "V D"]:
        """Returns the rows of all tokens."""
        weight = self.weight.get_value()
        if self.rows is None:
            return weight
        return with_rows(weight, self.tokens, self.rows.get_value())

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the float32 products with every row."""
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        return jnp.einsum(
            "...D,VD->...V",
            hidden,
            self.table().astype(hidden.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
