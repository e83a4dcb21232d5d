"""Token embedding, and the head when it has a weight of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastjax.nn.linear import AdapterSpec
from fastjax.nn.variables import Frozen, LoRAParam, abstract, variable


def with_rows(
    table: Float[Array, "V D"], tokens: tuple[int, ...], rows: Float[Array, "R D"]
) -> Float[Array, "V D"]:
    """Returns the table with other rows for some tokens."""
    return table.at[jnp.asarray(tokens)].set(rows.astype(table.dtype))


def with_product(
    table: Float[Array, "V D"],
    a: Float[Array, "_ R"],
    b: Float[Array, "R _"],
    *,
    scaling: Float[Array, ""] | float,
    is_head: bool,
) -> Float[Array, "V D"]:
    """Returns the float32 table plus what its adapter adds.

    Args:
      table: Rows of tokens.
      a: Down projection: of tokens (V, R), or of a head's hidden states (D, R).
      b: Up projection, from there to the other side.
      scaling: Factor of the product.
      is_head: The table is an output head of its own.
    """
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    added = scaling * (product.T if is_head else product)
    return table.astype(jnp.float32) + added


class Embedding(nnx.Module):
    """A (V, D) table: rows by token id, or logits against all rows.

    Attributes:
      weight: The table.
      tokens: Tokens that have a row of their own, beside the table.
      rows: These rows, which train in float32; None without any.
      lora_a: Down projection of an adapter: (V, R), of a head alone (D, R).
      lora_b: Its up projection: (R, D), of a head alone (R, V).
      lora_scaling: Factor of their product.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        dtype: jnp.dtype,
        is_trainable: bool,
        tokens: tuple[int, ...] = (),
        adapter: AdapterSpec | None = None,
        is_head: bool = False,
    ) -> None:
        table = abstract((vocabulary, features), dtype)
        self.weight = variable(table, is_trainable=is_trainable)
        self.tokens = tokens
        self.is_head = is_head
        f32 = jnp.dtype(jnp.float32)
        rows = abstract((len(tokens), features), f32)
        self.rows = LoRAParam(rows) if tokens else None
        rank = 0 if adapter is None else adapter.rank
        down, up = (features, vocabulary) if is_head else (vocabulary, features)
        self.lora_a = LoRAParam(abstract((down, rank), f32)) if adapter else None
        self.lora_b = LoRAParam(abstract((rank, up), f32)) if adapter else None
        self.lora_scaling = Frozen(jnp.float32(adapter.scaling)) if adapter else None

    def __call__(
        self, input_ids: Int[Array, "B T"], *, dtype: jnp.dtype
    ) -> Float[Array, "B T D"]:
        """Returns the row of each token."""
        x = self.weight.get_value()[input_ids]
        if self.lora_a is not None and self.lora_b is not None:
            down = self.lora_a.get_value()[input_ids]
            x = x.astype(jnp.float32) + self._scaling() * jnp.matmul(
                down, self.lora_b.get_value(), precision=jax.lax.Precision.HIGHEST
            )
        x = x.astype(dtype)
        if self.rows is None:
            return x
        tokens = jnp.asarray(self.tokens, input_ids.dtype)[None, None, :]
        is_token = input_ids[..., None] == tokens
        own = self.rows.get_value()[jnp.argmax(is_token, axis=-1)].astype(dtype)
        return jnp.where(jnp.any(is_token, axis=-1, keepdims=True), own, x)

    def table(self) -> Float[Array, "V D"]:
        """Returns the rows of all tokens."""
        weight = self.weight.get_value()
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a.get_value(), self.lora_b.get_value()
            whole = with_product(
                weight, a, b, scaling=self._scaling(), is_head=self.is_head
            )
            weight = whole.astype(weight.dtype)
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

    def _scaling(self) -> Float[Array, ""] | float:
        return 1.0 if self.lora_scaling is None else self.lora_scaling.get_value()
