"""Qwen2, Qwen2.5: q, k and v always have a bias; later layers may slide."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.windows import windows_by_layer, windows_by_layer_keys

QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    rules=DECODER_RULES,
    defaults=QWEN_DEFAULTS,
    switches=lambda fields: {"attention_bias": True},
    windows=windows_by_layer,
    keys=windows_by_layer_keys,
)
