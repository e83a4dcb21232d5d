"""Mistral 7B, Nemo and Small (2310.06825); the first had a sliding window."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig


def _config(
    sizes: tuple[int, int, int],
    *,
    vocabulary: int,
    theta: float,
    context: int,
    window: int | None = None,
) -> TransformerConfig:
    hidden, feed_forward, layers = sizes
    return TransformerConfig(
        family="mistral",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        layer_windows=(window,),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


_7B = (4096, 14336, 32)
_V1 = _config(_7B, vocabulary=32000, theta=1e4, context=32768, window=4096)
_V3 = _config(_7B, vocabulary=32768, theta=1e6, context=32768)
_NEMO = _config((5120, 14336, 40), vocabulary=131072, theta=1e6, context=131072)
_SMALL = _config((5120, 32768, 40), vocabulary=131072, theta=1e8, context=32768)

PRESETS = {
    "mistral-7b": Preset(hub_id="mistralai/Mistral-7B-v0.3", config=_V3),
    "mistral-7b-instruct": Preset(
        hub_id="mistralai/Mistral-7B-Instruct-v0.3", config=_V3
    ),
    "mistral-7b-v0.1": Preset(hub_id="mistralai/Mistral-7B-v0.1", config=_V1),
    "mistral-nemo-12b": Preset(hub_id="mistralai/Mistral-Nemo-Base-2407", config=_NEMO),
    "mistral-small-24b": Preset(
        hub_id="mistralai/Mistral-Small-24B-Base-2501", config=_SMALL
    ),
}
