"""One decoder layer."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax import remat
from fastjax.nn.attention import Attention, TokenContext
from fastjax.nn.feed_forward import (
    FeedForward,
    hand_back,
    handed_feed_forward,
    remade_feed_forward,
    scaled,
)
from fastjax.nn.kv_cache import LayerCache
from fastjax.nn.mlp import GatedMLP
from fastjax.nn.norm import RMSNorm, normed_and_input


class Block(nnx.Module):
    """Residual layer: attention, then the feed-forward network.

    Each is normalised at its input ("before"), its output ("after") or both
    ("around"). Norms have Hugging Face's names, and there post_attention_layernorm is
    the one before the feed-forward network in the first case, in the others the one
    after attention.
    """

    def __init__(
        self,
        make_norm: Callable[[], RMSNorm],
        *,
        self_attn: Attention,
        mlp: GatedMLP,
        norm_placement: Literal["before", "around", "after"] = "before",
        residual_scale: float = 1.0,
    ) -> None:
        is_around, is_after = (norm_placement == kind for kind in ("around", "after"))
        self.input_layernorm = None if is_after else make_norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = make_norm()
        self.pre_feedforward_layernorm = make_norm() if is_around else None
        self.mlp = mlp
        has_last = is_around or is_after
        self.post_feedforward_layernorm = make_norm() if has_last else None
        self.residual_scale = residual_scale

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        *,
        window: int | Int[Array, ""] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
        remakes_mlp: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the hidden states after this layer, and its cache if it had one.

        Args:
          x: Hidden states before it.
          context: What every layer knows of the tokens.
          window: How many tokens back a token sees, itself included; None: all.
          dropout_key: Of the adapters' dropout; None drops nothing.
          cache: Earlier keys and values.
          remakes_mlp: The backward pass finds nothing of the feed-forward half.
        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x, half, cache = self._attended(x, context, window, keys[0], cache)
        if remakes_mlp:
            return remade_feed_forward(half, x, keys[1]), cache
        return half(x, keys[1]), cache

    def handing(
        self,
        x: Float[Array, "B T D"],
        handed: Float[Array, "B T D"],
        context: TokenContext,
        *,
        window: int | Int[Array, ""] | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Returns the hidden states after this layer, and what the next keeps for it.

        Args:
          x: Hidden states before it.
          handed: What this layer keeps for the one before it.
          context: What every layer knows of the tokens.
          window: How many tokens back a token sees, itself included; None: all.
          dropout_key: Of the adapters' dropout; None drops nothing.
        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = hand_back(x, checkpoint_name(handed, remat.HANDED))
        x, half, _ = self._attended(x, context, window, keys[0], None)
        return handed_feed_forward(half, x, keys[1])

    def _attended(
        self,
        x: Float[Array, "B T D"],
        context: TokenContext,
        window: int | Int[Array, ""] | None,
        dropout_key: PRNGKeyArray | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], FeedForward, LayerCache | None]:
        """Returns the hidden states after attention, what follows, and the cache."""
        x = checkpoint_name(x, remat.LAYER_INPUT)
        normed, x = normed_and_input(self.input_layernorm, x)
        last = self.post_feedforward_layernorm
        is_sum = last is None and self.residual_scale == 1.0
        mixed, cache = self.self_attn(
            normed,
            context,
            window=window,
            dropout_key=dropout_key,
            cache=cache,
            residual=x if is_sum else None,
        )
        before_mlp = self.post_attention_layernorm
        if last is not None:
            mixed = self.post_attention_layernorm(mixed)
            before_mlp = self.pre_feedforward_layernorm
        # The name must sit on the array that the norm's VJP keeps, or the backward
        # pass would recompute the attention to get it.
        x = mixed if is_sum else x + scaled(mixed, self.residual_scale)
        x = checkpoint_name(x, remat.ATTENTION_RESIDUAL)
        half = FeedForward(before_mlp, self.mlp, last, self.residual_scale)
        return x, half, cache
