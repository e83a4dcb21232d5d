"""Granite: a Llama with factors at embeddings, attention, residuals and logits."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.llama import LLAMA

GRANITE = Family(
    architecture="GraniteForCausalLM",
    rules=DECODER_RULES,
    defaults=LLAMA.defaults
    | {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    switches=lambda fields: {
        **LLAMA.switches(fields),
        "embedding_scale": fields.number("embedding_multiplier"),
        "attention_scale": fields.number("attention_multiplier"),
        "residual_scale": fields.number("residual_multiplier"),
        "logit_scale": 1.0 / fields.number("logits_scaling"),
    },
    keys=lambda config: {
        **LLAMA.keys(config),
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    },
)
