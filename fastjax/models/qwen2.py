"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115): q, k and v have biases."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

_END_OF_TEXT, _END_OF_TURN = 151643, 151645

# hidden, feed-forward, layers, heads, kv heads, head size, vocabulary, tied
_SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 128, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 128, 152064, False),
}
_LOOSE_EPS = ("14b", "32b", "72b")


def _config(size: str, generation: str, *, is_instruct: bool) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads, head_dim, vocabulary, tied = _SIZES[
        size
    ]
    short = is_instruct or (generation == "2.5" and size in ("0.5b", "1.5b", "3b"))
    return TransformerConfig(
        family="qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768 if short else 131072,
        rms_norm_eps=1e-5 if size in _LOOSE_EPS and generation == "2.5" else 1e-6,
        rope=RopeConfig(theta=1e6),
        tie_word_embeddings=tied,
        attention_bias=True,
        bos_token_id=None,
        eos_token_ids=(_END_OF_TURN, _END_OF_TEXT) if is_instruct else (_END_OF_TEXT,),
    )


def _presets(generation: str, sizes: tuple[str, ...]) -> dict[str, Preset]:
    presets = {}
    for size in sizes:
        hub_id = f"Qwen/Qwen{generation}-{size.upper()}"
        for suffix, is_instruct in (("", False), ("-Instruct", True)):
            presets[f"qwen{generation}-{size}{suffix.lower()}"] = Preset(
                hub_id=hub_id + suffix,
                config=_config(size, generation, is_instruct=is_instruct),
            )
    return presets


PRESETS = _presets("2", ("0.5b", "1.5b", "7b", "72b")) | _presets("2.5", tuple(_SIZES))
