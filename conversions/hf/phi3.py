"""Phi-3, 3.5, 4 and 4-mini: fused q, k, v and gate, up, which stay as they are."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.windows import one_window, one_window_keys

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    rules=DECODER_RULES,
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "sliding_window": None,
    },
    switches=lambda fields: {"has_fused_projections": True},
    windows=one_window,
    keys=one_window_keys,
)
