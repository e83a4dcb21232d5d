"""Models that are a Llama or a Qwen2: Yi 1.5 and the DeepSeek-R1 distils."""

import dataclasses

from fastjax.models import llama, qwen2
from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig


def _yi(sizes: tuple[int, int, int, int, int]) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads = sizes
    return TransformerConfig(
        family="llama",
        vocab_size=64000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=5e6),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )


def _distilled(base: str) -> TransformerConfig:
    """Returns the size that was distilled into; the small ones are of Qwen2.5-Math."""
    if base.startswith("llama"):
        config = llama.PRESETS[base].config
        return dataclasses.replace(config, eos_token_ids=(128001,))
    config = qwen2.PRESETS[base].config
    is_math = base in ("qwen2.5-1.5b", "qwen2.5-7b")
    return dataclasses.replace(
        config,
        max_position_embeddings=131072,
        rope=RopeConfig(theta=1e4) if is_math else config.rope,
        tie_word_embeddings=False,
        bos_token_id=151646,
        eos_token_ids=(151643,),
    )


# hidden, feed-forward, layers, heads, kv heads
_YI = {
    "6B": _yi((4096, 11008, 32, 32, 4)),
    "9B": _yi((4096, 11008, 48, 32, 4)),
    "34B": _yi((7168, 20480, 60, 56, 8)),
}
_DISTILS = {
    "Qwen-1.5B": "qwen2.5-1.5b",
    "Qwen-7B": "qwen2.5-7b",
    "Qwen-14B": "qwen2.5-14b",
    "Qwen-32B": "qwen2.5-32b",
    "Llama-8B": "llama3.1-8b",
    "Llama-70B": "llama3.3-70b",
}

PRESETS = {
    f"yi1.5-{size.lower()}{suffix.lower()}": Preset(
        hub_id=f"01-ai/Yi-1.5-{size}{suffix}", config=config
    )
    for size, config in _YI.items()
    for suffix in ("", "-Chat")
}
PRESETS |= {
    f"deepseek-r1-{name.lower()}": Preset(
        hub_id=f"deepseek-ai/DeepSeek-R1-Distill-{name}", config=_distilled(base)
    )
    for name, base in _DISTILS.items()
}
