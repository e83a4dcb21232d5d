"""SmolLM2 (2502.02737), which is a Llama, and SmolLM3, which leaves out some RoPE."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig


def _second(
    sizes: tuple[int, int, int, int, int], theta: float, *, is_instruct: bool
) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads = sizes
    return TransformerConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        tie_word_embeddings=True,
        bos_token_id=1 if is_instruct else 0,
        eos_token_ids=(2,) if is_instruct else (0,),
    )


_THIRD = TransformerConfig(
    family="smollm3",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=65536,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=5e6),
    layers_without_rope=tuple(range(3, 36, 4)),
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_ids=(128012,),
    pad_token_id=128004,
)

# hidden, feed-forward, layers, heads, kv heads
_SIZES = {
    "135M": ((576, 1536, 30, 9, 3), 1e5),
    "360M": ((960, 2560, 32, 15, 5), 1e5),
    "1.7B": ((2048, 8192, 24, 32, 32), 1.3e5),
}

PRESETS = {
    f"smollm2-{size.lower()}{suffix.lower()}": Preset(
        hub_id=f"HuggingFaceTB/SmolLM2-{size}{suffix}",
        config=_second(sizes, theta, is_instruct=bool(suffix)),
    )
    for size, (sizes, theta) in _SIZES.items()
    for suffix in ("", "-Instruct")
}
PRESETS["smollm3-3b"] = Preset(hub_id="HuggingFaceTB/SmolLM3-3B", config=_THIRD)
