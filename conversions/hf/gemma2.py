"""Gemma 2: norms around both halves, soft bounds, a window on every other layer."""

from conversions.hf.config_fields import ConfigFields
from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.windows import windows_between, windows_between_keys
from fastjax.models.transformer_config import TransformerConfig

GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
}


def gemma_switches(fields: ConfigFields) -> dict[str, object]:
    """Returns what Gemma 2 and 3 share."""
    if fields.get("use_bidirectional_attention"):
        raise fields.error("use_bidirectional_attention", "false")
    bias = fields.flag("attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm_offset": 1.0,
        "norm_placement": "around",
        "embedding_scale": fields.integer("hidden_size") ** 0.5,
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.optional_number("attn_logit_softcapping"),
        "logit_softcap": fields.optional_number("final_logit_softcapping"),
    }


def gemma_keys(config: TransformerConfig) -> dict[str, object]:
    """Returns the keys that `gemma_switches` reads."""
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    return {
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **windows_between_keys(config),
    }


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    rules=DECODER_RULES,
    defaults=GEMMA_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    switches=gemma_switches,
    keys=gemma_keys,
    windows=windows_between,
    activation_key="hidden_activation",
)
