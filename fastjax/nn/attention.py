"""Causal grouped-query self-attention with rotary positions."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax import remat
from fastjax.config import Implementations
from fastjax.nn.kv_cache import LayerCache
from fastjax.nn.linear import Linear, project
from fastjax.nn.norm import RMSNorm
from kernels.attention import attention
from kernels.rope import rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenContext:
    """What every layer knows of the tokens.

    Attributes:
      positions: Place in the document, from 0; in decoding also the cache slot.
      cos: Of each position and pair of features.
      sin: The same.
      segment_ids: Document of each token, 0 for padding; None: one document a row.
      max_segments: Upper bound of the documents in a row, when known.
      is_prefill: No token sees a cache, though one may be written.
    """

    positions: Int[Array, "B T"]
    cos: Float[Array, "B T half_H"]
    sin: Float[Array, "B T half_H"]
    segment_ids: Int[Array, "B T"] | None
    max_segments: int | None = dataclasses.field(metadata={"static": True})
    is_prefill: bool = dataclasses.field(metadata={"static": True})


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions (2305.13245, 2104.09864)."""

    def __init__(
        self,
        make_linear: Callable[[str, int, int, bool], Linear],
        make_norm: Callable[[int], RMSNorm],
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        has_bias: bool,
        has_out_bias: bool,
        qk_norm: bool,
        implementations: Implementations,
    ) -> None:
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = make_linear("self_attn.q_proj", hidden_size, queries, has_bias)
        self.k_proj = make_linear("self_attn.k_proj", hidden_size, keys, has_bias)
        self.v_proj = make_linear("self_attn.v_proj", hidden_size, keys, has_bias)
        self.o_proj = make_linear(
            "self_attn.o_proj", queries, hidden_size, has_out_bias
        )
        self.q_norm = make_norm(head_dim) if qk_norm else None
        self.k_norm = make_norm(head_dim) if qk_norm else None
        self.head_dim = head_dim
        self.implementations = implementations

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        *,
        window: int | Int[Array, ""] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Mixes each token with the earlier tokens of its own document.

        Args:
          x: Normalised hidden states.
          context: Positions, their rotary tables and documents.
          window: How many tokens back a token sees, itself included; None: all.
          dropout_key: Of the adapters' dropout; None drops nothing.
          cache: Earlier keys and values, none in a prefill; the new ones are added.
        """
        q, k, v = self._projections(x, context, dropout_key)
        q_index = None
        if cache is not None:
            cache = cache.updated(k, v, context.positions)
            # A prompt that starts its row is mixed like a row of training: padding at
            # its end reaches no token of it.
            if not context.is_prefill:
                k, v, q_index = cache.keys, cache.values, context.positions
        mixed = attention(
            q,
            k,
            v,
            q_index=q_index,
            segment_ids=context.segment_ids,
            window=window,
            max_segments=context.max_segments,
            implementation=self.implementations.attention,
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        flat = mixed.reshape(*x.shape[:2], -1)
        return self.o_proj(flat, dropout_key=key), cache

    def _projections(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Array, Array, Array]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.head_dim)
            for y in project(x, linears, dropout_key=key)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(checkpoint_name(q, remat.QUERY_RAW))
            k = self.k_norm(checkpoint_name(k, remat.KEY_RAW))
        q, k = rope(
            q, k, context.cos, context.sin, implementation=self.implementations.rope
        )
        return (
            checkpoint_name(q, remat.QUERY),
            checkpoint_name(k, remat.KEY),
            checkpoint_name(v, remat.VALUE),
        )
