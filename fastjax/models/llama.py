"""Llama 3, 3.1, 3.2 and 3.3 (2407.21783)."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

_CONTEXT = 131072


def _rope(factor: float | None) -> RopeConfig:
    if factor is None:
        return RopeConfig(theta=500000.0)
    return RopeConfig(kind="llama3", theta=500000.0, factor=factor)


def _config(
    sizes: tuple[int, int, int, int, int],
    *,
    factor: float | None = None,
    head_dim: int = 128,
    tied: bool = False,
    is_instruct: bool = False,
) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads = sizes
    stops = (128001,)
    if is_instruct:
        stops = (128001, 128009) if factor is None else (128001, 128008, 128009)
    return TransformerConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192 if factor is None else _CONTEXT,
        rms_norm_eps=1e-5,
        rope=_rope(factor),
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_ids=stops,
    )


_8B = (4096, 14336, 32, 32, 8)
_70B = (8192, 28672, 80, 64, 8)
_405B = (16384, 53248, 126, 128, 8)
_1B = (2048, 8192, 16, 32, 8)
_3B = (3072, 8192, 28, 24, 8)

_SIZES = {
    "llama3-8b": ("Meta-Llama-3-8B", _8B, {}),
    "llama3-70b": ("Meta-Llama-3-70B", _70B, {}),
    "llama3.1-8b": ("Llama-3.1-8B", _8B, {"factor": 8.0}),
    "llama3.1-70b": ("Llama-3.1-70B", _70B, {"factor": 8.0}),
    "llama3.1-405b": ("Llama-3.1-405B", _405B, {"factor": 8.0}),
    "llama3.2-1b": (
        "Llama-3.2-1B",
        _1B,
        {"factor": 32.0, "head_dim": 64, "tied": True},
    ),
    "llama3.2-3b": ("Llama-3.2-3B", _3B, {"factor": 32.0, "tied": True}),
}

PRESETS = {
    name: Preset(hub_id=f"meta-llama/{hub}", config=_config(sizes, **extra))
    for name, (hub, sizes, extra) in _SIZES.items()
}
PRESETS |= {
    f"{name}-instruct": Preset(
        hub_id=f"meta-llama/{hub}-Instruct",
        config=_config(sizes, is_instruct=True, **extra),
    )
    for name, (hub, sizes, extra) in _SIZES.items()
}
PRESETS["llama3.3-70b"] = Preset(
    hub_id="meta-llama/Llama-3.3-70B-Instruct",
    config=_config(_70B, factor=8.0, is_instruct=True),
)
PRESETS["tiny"] = Preset(
    hub_id=None,
    config=TransformerConfig(
        family="llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(4,),
        pad_token_id=5,
    ),
)
