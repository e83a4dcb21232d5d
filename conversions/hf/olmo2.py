"""OLMo 2: norms after both halves, q and k normalised over all heads at once."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    rules=DECODER_RULES,
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "pad_token_id": 1,
        "eos_token_id": 50279,
        "attention_bias": False,
    },
    switches=lambda fields: {
        "attention_bias": fields.flag("attention_bias"),
        "attention_out_bias": fields.flag("attention_bias"),
        "norm_placement": "after",
        "qk_norm": "row",
    },
    keys=lambda config: {"attention_bias": config.attention_bias},
)
