"""Token embedding, and the head when it has a weight of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax.nn.linear import AdapterSpec
from fastjax.nn.variables import Frozen, LoRAParam, abstract, variable
from kernels.cross_entropy import HeadAdapter
from kernels.lora_matmul import scaled_down_product


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
      lora_a: Down projection of an adapter: (V, R), of a head alone (D, R).
      lora_b: Its up projection: (R, D), of a head alone (R, V).
      lora_scaling: Factor of their product.
      lora_dropout: Share of a head's hidden states that their product drops.
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
        self.lora_dropout = adapter.dropout if adapter else 0.0

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
        """Returns the rows of all tokens, without what the adapter adds."""
        weight = self.weight.get_value()
        if self.rows is None:
            return weight
        return with_rows(weight, self.tokens, self.rows.get_value())

    def head_adapter(
        self, hidden: Float[Array, "M D"], *, dropout_key: PRNGKeyArray | None = None
    ) -> HeadAdapter | None:
        """Returns what the adapter adds to the logits of hidden states, as a product.

        The table is not touched: in its 16 bits a small change would round to none.

        Args:
          hidden: What the logits are of.
          dropout_key: Without one nothing is dropped.
        """
        if self.lora_a is None or self.lora_b is None:
            return None
        down, up = self.lora_a.get_value(), self.lora_b.get_value().T
        if not self.is_head:
            down, up = up, down
        scaled = scaled_down_product(
            hidden,
            down,
            scaling=self._scaling(),
            dropout_rate=self.lora_dropout,
            dropout_key=dropout_key,
        )
        return HeadAdapter(scaled, up)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the float32 products with every row."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = _scores(rows, self.table())
        adapter = self.head_adapter(rows)
        if adapter is not None:
            logits = logits + _scores(adapter.down, adapter.up)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _scaling(self) -> Float[Array, ""] | float:
        return 1.0 if self.lora_scaling is None else self.lora_scaling.get_value()


def _scores(x: Float[Array, "M D"], table: Float[Array, "V D"]) -> Float[Array, "M V"]:
    """Returns the float32 products, with the table in the dtype of `x`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(
        x,
        table.astype(x.dtype).T,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
