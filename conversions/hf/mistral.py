"""Mistral: no biases, one sliding window for all layers."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.windows import one_window, one_window_keys

MISTRAL = Family(
    architecture="MistralForCausalLM",
    rules=DECODER_RULES,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    windows=one_window,
    keys=one_window_keys,
)
