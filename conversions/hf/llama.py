"""Llama 3, 3.1, 3.2, 3.3: one switch gives all four attention projections a bias."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family

LLAMA = Family(
    architecture="LlamaForCausalLM",
    rules=DECODER_RULES,
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    switches=lambda fields: {
        "attention_bias": fields.flag("attention_bias"),
        "attention_out_bias": fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
    },
    keys=lambda config: {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    },
)
