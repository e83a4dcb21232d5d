"""Phi-3 (2404.14219) and Phi-4 (2412.08905); those with longrope load by hub name."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig


def _config(
    sizes: tuple[int, int, int, int, int],
    *,
    vocabulary: int,
    context: int,
    stops: tuple[int, ...],
    theta: float = 1e4,
    window: int | None = None,
    first: int = 1,
) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads = sizes
    return TransformerConfig(
        family="phi3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        has_fused_projections=True,
        layer_windows=(window,),
        bos_token_id=first,
        eos_token_ids=stops,
        pad_token_id=stops[0],
    )


_PHI3 = {"vocabulary": 32064, "context": 4096, "stops": (32000, 32001, 32007)}
_MINI = _config((3072, 8192, 32, 32, 32), window=2047, **_PHI3)
_MEDIUM = _config((5120, 17920, 40, 40, 10), window=2047, **_PHI3)
_PHI4 = _config(
    (5120, 17920, 40, 40, 10),
    vocabulary=100352,
    context=16384,
    stops=(100265,),
    theta=250000.0,
    first=100257,
)

PRESETS = {
    "phi3-mini": Preset(hub_id="microsoft/Phi-3-mini-4k-instruct", config=_MINI),
    "phi3-medium": Preset(hub_id="microsoft/Phi-3-medium-4k-instruct", config=_MEDIUM),
    "phi4": Preset(hub_id="microsoft/phi-4", config=_PHI4),
}
