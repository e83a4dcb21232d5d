"""One decoder layer."""

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
    """Pre-norm residual layer: attention, then the feed-forward network."""

    def __init__(
        self,
        *,
        input_layernorm: RMSNorm,
        self_attn: Attention,
        post_attention_layernorm: RMSNorm,
        mlp: GatedMLP,
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

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
        mixed, cache = self.self_attn(
            self.input_layernorm(x),
            context,
            window=window,
            dropout_key=keys[0],
            cache=cache,
        )
        # The name must sit on the array that the norm's VJP keeps, or the backward
        # pass would recompute the attention to get it.
        x = checkpoint_name(x + mixed, remat.ATTENTION_RESIDUAL)
        update = self.mlp(self.post_attention_layernorm(x), dropout_key=keys[1])
        return x + update, cache
