"""One decoder layer."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastjax import remat
from fastjax.nn.attention import Attention, TokenContext
from fastjax.nn.kv_cache import LayerCache
from fastjax.nn.mlp import GatedMLP
from fastjax.nn.norm import RMSNorm


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
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the hidden states after this layer, and its cache if it had one."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = checkpoint_name(x, remat.LAYER_INPUT)
        normed, x = _forked(x, self.input_layernorm)
        mixed, cache = self.self_attn(
            normed,
            context,
            window=window,
            dropout_key=keys[0],
            cache=cache,
        )
        before_mlp = self.post_attention_layernorm
        if self.post_feedforward_layernorm is not None:
            mixed = self.post_attention_layernorm(mixed)
            before_mlp = self.pre_feedforward_layernorm
        # The name must sit on the array that the norm's VJP keeps, or the backward
        # pass would recompute the attention to get it.
        x = checkpoint_name(x + self._scaled(mixed), remat.ATTENTION_RESIDUAL)
        normed, x = _forked(x, before_mlp)
        update = self.mlp(normed, dropout_key=keys[1])
        if self.post_feedforward_layernorm is not None:
            update = self.post_feedforward_layernorm(update)
        return x + self._scaled(update), cache

    def _scaled(self, update: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return update if self.residual_scale == 1.0 else update * self.residual_scale


def _forked(
    x: Float[Array, "B T D"], norm: RMSNorm | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns what the next part reads, and what its update is added to."""
    return (x, x) if norm is None else norm.and_input(x)
