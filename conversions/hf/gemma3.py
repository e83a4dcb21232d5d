"""Gemma 3, text: as Gemma 2 with normalised q and k and two kinds of RoPE."""

from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.gemma2 import GEMMA_DEFAULTS, gemma_keys, gemma_switches
from conversions.hf.rope import ropes_by_attention, ropes_by_attention_keys
from conversions.hf.windows import windows_between

_THETA, _LOCAL_THETA = 1e6, 1e4

GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    rules=DECODER_RULES,
    defaults=GEMMA_DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "rope_theta": _THETA,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    switches=lambda fields: gemma_switches(fields) | {"qk_norm": "head"},
    keys=gemma_keys,
    windows=windows_between,
    ropes=ropes_by_attention(_LOCAL_THETA),
    rope_keys=ropes_by_attention_keys,
    activation_key="hidden_activation",
)
