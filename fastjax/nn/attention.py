"""Causal grouped-query self-attention with rotary positions."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax import remat
from fastjax.config import Implementations
from fastjax.nn.kv_cache import LayerCache
from fastjax.nn.linear import Linear, project
from fastjax.nn.norm import RMSNorm
from kernels.attention import Visits, attention, attention_visits
from kernels.rope import rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenContext:
    """What every layer knows of the tokens.

    Attributes:
      positions: Place in the document, from 0; in decoding also the cache slot.
      cos: Of each position and pair of turning features, for each kind of RoPE;
        without that axis inside a layer.
      sin: The same.
      segment_ids: Document of each token, 0 for padding; None: one document a row.
      max_segments: Upper bound of the documents in a row, when known.
      is_prefill: No token sees a cache, though one may be written.
      visits: What layers with one window make of the documents, if made before them.
      is_lean: The backward pass spends time rather than memory.
    """

    positions: Int[Array, "B T"]
    cos: Float[Array, "*P B T half"]
    sin: Float[Array, "*P B T half"]
    segment_ids: Int[Array, "B T"] | None
    max_segments: int | None = dataclasses.field(metadata={"static": True})
    is_prefill: bool = dataclasses.field(metadata={"static": True})
    visits: Visits | None = None
    is_lean: bool = dataclasses.field(default=False, metadata={"static": True})

    def for_layer(
        self, rope: int | Int[Array, ""], *, is_lean: bool = False
    ) -> "TokenContext":
        """Returns what a layer with that kind of RoPE knows."""
        cos, sin = self.cos[rope], self.sin[rope]
        return dataclasses.replace(self, cos=cos, sin=sin, is_lean=is_lean)


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
        is_fused: bool,
        qk_norm: Literal["head", "row"] | None,
        scale: float | None,
        softcap: float | None,
        implementations: Implementations,
    ) -> None:
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim

        def make(name: str, features: int) -> Linear | None:
            if is_fused != (name == "qkv_proj"):
                return None
            return make_linear(f"self_attn.{name}", hidden_size, features, has_bias)

        self.q_proj = make("q_proj", queries)
        self.k_proj = make("k_proj", keys)
        self.v_proj = make("v_proj", keys)
        self.qkv_proj = make("qkv_proj", queries + 2 * keys)
        self.o_proj = make_linear(
            "self_attn.o_proj", queries, hidden_size, has_out_bias
        )
        is_row = qk_norm == "row"
        self.q_norm = make_norm(queries if is_row else head_dim) if qk_norm else None
        self.k_norm = make_norm(keys if is_row else head_dim) if qk_norm else None
        self.qk_norm = qk_norm
        self.feature_borders = (queries, queries + keys)
        self.head_dim = head_dim
        self.scale = scale
        self.softcap = softcap
        self.implementations = implementations

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        *,
        window: int | Int[Array, ""] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
        residual: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Mixes each token with the earlier tokens of its own document.

        Args:
          x: Normalised hidden states.
          context: Positions, their rotary tables and documents.
          window: How many tokens back a token sees, itself included; None: all.
          dropout_key: Of the adapters' dropout; None drops nothing.
          cache: Earlier keys and values, none in a prefill; the new ones are added.
          residual: Added to the result.
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
            visits=context.visits,
            keeps_dscores=not context.is_lean,
            scale=self.scale,
            softcap=self.softcap,
            implementation=self.implementations.attention,
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        flat = mixed.reshape(*x.shape[:2], -1)
        return self.o_proj(flat, dropout_key=key, residual=residual), cache

    def prepared(self, context: TokenContext, window: int | None) -> TokenContext:
        """Returns the context with what layers like this one share besides it.

        Made before the layers it is made once a step, not in each of their passes.
        """
        rows = jax.ShapeDtypeStruct(
            (*context.positions.shape, 1, self.head_dim), jnp.bfloat16
        )
        visits = attention_visits(
            rows, segment_ids=context.segment_ids, window=window, softcap=self.softcap
        )
        return dataclasses.replace(context, visits=visits)

    def _projections(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Array, Array, Array]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
        linears = (self.q_proj, self.k_proj, self.v_proj, self.qkv_proj)
        rows = project(x, [linear for linear in linears if linear], dropout_key=key)
        if len(rows) == 1:
            rows = jnp.split(rows[0], self.feature_borders, axis=-1)
        q, k, v = self._normalised(*rows)
        q, k = self._turned(q, k, context)
        return (
            checkpoint_name(q, remat.QUERY),
            checkpoint_name(k, remat.KEY),
            checkpoint_name(v, remat.VALUE),
        )

    def _normalised(
        self,
        q: Float[Array, "B T _"],
        k: Float[Array, "B T _"],
        v: Float[Array, "B T _"],
    ) -> tuple[Array, ...]:
        """Returns the rows cut into heads, q and k normalised where they are to be."""

        def heads(row: Array) -> Array:
            """Returns rows or heads as heads."""
            return row.reshape(*row.shape[:2], -1, self.head_dim)

        if self.q_norm is None or self.k_norm is None:
            return heads(q), heads(k), heads(v)
        if self.qk_norm == "head":
            q, k = heads(q), heads(k)
        q = self.q_norm(checkpoint_name(q, remat.QUERY_RAW))
        k = self.k_norm(checkpoint_name(k, remat.KEY_RAW))
        return heads(q), heads(k), heads(v)

    def _turned(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        context: TokenContext,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
        """Returns q and k with their turning features rotated, the first ones."""
        turning = 2 * context.cos.shape[-1]
        implementation = self.implementations.rope
        if turning == self.head_dim:
            return rope(q, k, context.cos, context.sin, implementation=implementation)
        turned = rope(
            q[..., :turning],
            k[..., :turning],
            context.cos,
            context.sin,
            implementation=implementation,
        )
        q_turned, k_turned = turned
        return (
            jnp.concatenate([q_turned, q[..., turning:]], axis=-1),
            jnp.concatenate([k_turned, k[..., turning:]], axis=-1),
        )
