"""Qwen3, the dense ones (2505.09388): q and k are normalised per head."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

_END_OF_TEXT, _END_OF_TURN = 151643, 151645

# hidden, feed-forward, layers, heads, tied
_SIZES = {
    "0.6b": (1024, 3072, 28, 16, True),
    "1.7b": (2048, 6144, 28, 16, True),
    "4b": (2560, 9728, 36, 32, True),
    "8b": (4096, 12288, 36, 32, False),
    "14b": (5120, 17408, 40, 40, False),
    "32b": (5120, 25600, 64, 64, False),
}


def _config(size: str, *, is_base: bool) -> TransformerConfig:
    hidden, feed_forward, layers, heads, tied = _SIZES[size]
    return TransformerConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768 if is_base else 40960,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        tie_word_embeddings=tied,
        qk_norm="head",
        bos_token_id=None,
        eos_token_ids=(_END_OF_TEXT,) if is_base else (_END_OF_TURN, _END_OF_TEXT),
    )


PRESETS = {
    f"qwen3-{size}": Preset(
        hub_id=f"Qwen/Qwen3-{size.upper()}", config=_config(size, is_base=False)
    )
    for size in _SIZES
} | {
    f"qwen3-{size}-base": Preset(
        hub_id=f"Qwen/Qwen3-{size.upper()}-Base", config=_config(size, is_base=True)
    )
    for size in _SIZES
    if size != "32b"
}
