"""Qwen3 dense: q and k are normalised per head; heads have their own size."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.qwen2 import QWEN_DEFAULTS
from conversions.hf.windows import windows_by_layer, windows_by_layer_keys

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    rules=DECODER_RULES,
    defaults=QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    switches=lambda fields: {
        "attention_bias": fields.flag("attention_bias"),
        "attention_out_bias": fields.flag("attention_bias"),
        "qk_norm": "head",
    },
    windows=windows_by_layer,
    keys=lambda config: {
        "attention_bias": config.attention_bias,
        **windows_by_layer_keys(config),
    },
)
