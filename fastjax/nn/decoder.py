"""The whole decoder: embedding, segments of scanned layers, norm and head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax.config import RematPolicy
from fastjax.nn.attention import TokenContext
from fastjax.nn.block import Block
from fastjax.nn.embedding import Embedding
from fastjax.nn.kv_cache import (
    KVCache,
    LayerCache,
    SegmentCache,
    empty_segment_cache,
)
from fastjax.nn.norm import RMSNorm
from fastjax.nn.rope import RotaryEmbedding
from fastjax.nn.stacked import layer_of, planned, scanned, summed_layer_of
from fastjax.nn.variables import Frozen
from fastjax.remat import KEEPING, Remat, RematPlan, remat_plan
from kernels.cross_entropy import HeadAdapter


class Segment(nnx.Module):
    """Consecutive layers of equal structure, stacked on axis 0 and run by one scan.

    Attributes:
      block: A layer whose every variable has a leading axis L.
      window: Sliding window in tokens when all its layers share one.
      windows: Window of each layer when they differ.
      rope: Kind of RoPE, as index, when all its layers share one.
      ropes: Kind of each layer when they differ.
    """

    def __init__(
        self,
        block: Block,
        *,
        num_layers: int,
        window: int | None = None,
        windows: Int[Array, " L"] | None = None,
        rope: int = 0,
        ropes: Int[Array, " L"] | None = None,
    ) -> None:
        self.block = block
        self.num_layers = num_layers
        self.window = window
        self.windows = None if windows is None else Frozen(windows)
        self.rope = rope
        self.ropes = None if ropes is None else Frozen(ropes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        *,
        remat: RematPlan | None = None,
        first_layer: int = 0,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states after these layers.

        Args:
          x: Hidden states before them.
          context: What every layer knows of the tokens.
          remat: Of the whole decoder; None where nothing is differentiated.
          first_layer: Place of these layers in the decoder.
          dropout_key: Of the adapters' dropout; None drops nothing.
        """
        keys = (
            None
            if dropout_key is None
            else jax.random.split(dropout_key, self.num_layers)
        )
        if self.windows is None:
            context = self.block.self_attn.prepared(context, self.window)
        graphdef, trained, frozen = nnx.split(self.block, nnx.Param, ...)
        frozen = (frozen, *self._places())
        inputs = (trained, keys)

        def layer(
            policy: RematPolicy | None, index: Any, hidden: Any, own: Any, stacks: Any
        ) -> Any:
            trained, key = own
            # Picked here, since a stack that is cut before the scan would be copied.
            is_offloading = policy in ("offload", "layer_offload")
            pick = summed_layer_of if is_offloading else layer_of
            held, window, rope = jax.tree.map(functools.partial(pick, index), stacks)
            block = nnx.merge(graphdef, trained, held)
            own_context = context.for_layer(
                self.rope if rope is None else rope, is_lean=policy not in KEEPING
            )
            window = self.window if window is None else window
            if policy == "offload":
                x, handed = hidden
                return block.handing(
                    x, handed, own_context, window=window, dropout_key=key
                )
            return block(
                hidden,
                own_context,
                window=window,
                dropout_key=key,
                remakes_mlp=policy in ("layer", "layer_offload"),
            )[0]

        if remat is None:
            kept = functools.partial(layer, None)
            return scanned(kept, x, inputs, frozen, layers=range(self.num_layers))
        layers = range(first_layer, first_layer + self.num_layers)
        return planned(layer, x, inputs, frozen, remat=remat, layers=layers)

    def decode(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        cache: SegmentCache,
    ) -> tuple[Float[Array, "B T D"], SegmentCache]:
        """Returns the hidden states after these layers, and their updated cache."""
        graphdef, stacked = nnx.split(self.block)

        def body(carry: tuple[Array, SegmentCache], layer: Any) -> tuple[Any, None]:
            hidden, segment = carry
            weights, (window, rope), index = layer
            hidden, updated = nnx.merge(graphdef, weights)(
                hidden,
                context.for_layer(self.rope if rope is None else rope),
                window=self.window if window is None else window,
                cache=LayerCache(segment, index),
            )
            assert updated is not None
            return (hidden, updated.segment), None

        layers = jnp.arange(self.num_layers)
        return jax.lax.scan(body, (x, cache), (stacked, self._places(), layers))[0]

    def _places(self) -> tuple[Array | None, Array | None]:
        """Returns the layers' windows and RoPEs where they differ."""
        windows = None if self.windows is None else self.windows.get_value()
        ropes = None if self.ropes is None else self.ropes.get_value()
        return windows, ropes


class Decoder(nnx.Module):
    """A decoder-only transformer: token ids in, hidden states or logits out."""

    def __init__(
        self,
        *,
        embed_tokens: Embedding,
        segments: list[Segment],
        norm: RMSNorm,
        lm_head: Embedding | None,
        rotary: RotaryEmbedding,
        num_kv_heads: int,
        head_dim: int,
        compute_dtype: jnp.dtype,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        self.embed_tokens = embed_tokens
        self.segments = nnx.List(segments)
        self.norm = norm
        self.lm_head = lm_head
        self.rotary = rotary
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.compute_dtype = compute_dtype
        self.embedding_scale = embedding_scale
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        max_segments: int | None = None,
        dropout_key: PRNGKeyArray | None = None,
        embedding_noise: Float[Array, "B T D"] | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states after the last norm, times `logit_scale`.

        Args:
          input_ids: Token ids.
          positions: Place in the document, from 0; restarts with each packed one.
          segment_ids: Document of each token, 0 for padding; None when a row is one
            document, padded at its end if at all.
          max_segments: Upper bound of the documents in a row, when known.
          dropout_key: Of the adapters' dropout; None drops nothing.
          embedding_noise: Added to the embeddings.
          remat: What the backward pass recomputes; None where there is none.
        """
        context = self._context(positions, segment_ids, max_segments)
        x = self._embedded(input_ids)
        x = x if embedding_noise is None else x + embedding_noise
        plan = remat_plan(remat, sum(segment.num_layers for segment in self.segments))
        layer = 0
        for index, segment in enumerate(self.segments):
            key = (
                None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            )
            x = segment(x, context, remat=plan, first_layer=layer, dropout_key=key)
            layer += segment.num_layers
        return _scaled(self.norm(x), self.logit_scale)

    def decode(
        self,
        input_ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        cache: KVCache,
        is_prefill: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the hidden states of new tokens that see the cache, and the new one.

        Args:
          input_ids: New tokens.
          positions: Place of each, which is also its slot; a place beyond the cache
            marks padding.
          cache: Keys and values of all earlier tokens.
          is_prefill: The tokens are whole prompts from position 0, padded at their
            end, and the cache is empty: they are mixed as in training, by the fastest
            attention, and the cache is written but not read.
        """
        slots = cache[0].keys.shape[2]
        cos, sin = self.rotary(positions, context_tokens=slots)
        context = TokenContext(positions, cos, sin, None, None, is_prefill=is_prefill)
        x = self._embedded(input_ids)
        caches = []
        for segment, old in zip(self.segments, cache, strict=True):
            x, new = segment.decode(x, context, old)
            caches.append(new)
        return _scaled(self.norm(x), self.logit_scale), tuple(caches)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """Returns a cache for `batch` rows of at most `slots` tokens."""
        sizes = (batch, slots, self.num_kv_heads, self.head_dim)
        return tuple(
            empty_segment_cache((segment.num_layers, *sizes), self.compute_dtype)
            for segment in self.segments
        )

    def head_weight(self) -> Float[Array, "V D"]:
        """Returns the table that gives logits, without what its adapter adds."""
        return self._head().table()

    def head_adapter(
        self, hidden: Float[Array, "M D"], *, dropout_key: PRNGKeyArray | None = None
    ) -> HeadAdapter | None:
        """Returns what the head's adapter adds to the logits; None without one.

        Args:
          hidden: As `__call__` returns them.
          dropout_key: As given there.
        """
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, len(self.segments))
        return self._head().head_adapter(hidden, dropout_key=dropout_key)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the float32 score of every token of the vocabulary."""
        logits = self._head().logits(hidden)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap)

    def _head(self) -> Embedding:
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def _context(
        self,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        max_segments: int | None,
    ) -> TokenContext:
        cos, sin = self.rotary(positions)
        return TokenContext(
            positions, cos, sin, segment_ids, max_segments, is_prefill=False
        )

    def _embedded(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        embedded = self.embed_tokens(input_ids, dtype=self.compute_dtype)
        return _scaled(embedded, self.embedding_scale)


def _scaled(x: Float[Array, "*B D"], scale: float) -> Float[Array, "*B D"]:
    """Returns the product with the scale, rounded to the dtype of `x` as torch does."""
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
