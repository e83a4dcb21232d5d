"""OLMo 2 (2501.00656) and 3: norms after both halves, q and k normalised."""

import dataclasses

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

_THETA = 5e5
_END, _PAD = 100257, 100277


def _config(sizes: tuple[int, int, int, int, int]) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads = sizes
    return TransformerConfig(
        family="olmo2",
        vocab_size=100352,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=_THETA),
        norm_placement="after",
        qk_norm="row",
        eos_token_ids=(_END,),
        pad_token_id=_PAD,
    )


def _third(config: TransformerConfig) -> TransformerConfig:
    stretched = RopeConfig(
        kind="yarn",
        theta=_THETA,
        factor=8.0,
        original_max_position_embeddings=8192,
        attention_factor=1.2079441541679836,
    )
    return dataclasses.replace(
        config,
        family="olmo3",
        vocab_size=100278,
        max_position_embeddings=65536,
        rope=stretched,
        local_rope=RopeConfig(theta=_THETA),
        layer_windows=tuple(
            4096 if (layer + 1) % 4 else None
            for layer in range(config.num_hidden_layers)
        ),
    )


# hidden, feed-forward, layers, heads, kv heads
_1B = _config((2048, 8192, 16, 16, 16))
_7B = _config((4096, 11008, 32, 32, 32))
_13B = _config((5120, 13824, 40, 40, 40))
_32B = _config((5120, 27648, 64, 40, 8))
_HUB = {
    "olmo2-1b": ("OLMo-2-0425-1B", _1B),
    "olmo2-7b": ("OLMo-2-1124-7B", _7B),
    "olmo2-13b": ("OLMo-2-1124-13B", _13B),
    "olmo2-32b": ("OLMo-2-0325-32B", _32B),
}

PRESETS = {
    name + suffix.lower(): Preset(hub_id=f"allenai/{hub}{suffix}", config=config)
    for name, (hub, config) in _HUB.items()
    for suffix in ("", "-Instruct")
}
PRESETS["olmo3-7b"] = Preset(hub_id="allenai/Olmo-3-1025-7B", config=_third(_7B))
PRESETS["olmo3-32b"] = Preset(hub_id="allenai/Olmo-3-1125-32B", config=_third(_32B))
