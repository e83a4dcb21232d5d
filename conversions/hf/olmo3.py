"""OLMo 3: OLMo 2 with sliding windows, and stretched RoPE on full attention only."""

import dataclasses

from conversions.hf.olmo2 import OLMO2
from conversions.hf.rope import ropes_by_attention, ropes_by_attention_keys
from conversions.hf.windows import windows_between, windows_between_keys

OLMO3 = dataclasses.replace(
    OLMO2,
    architecture="Olmo3ForCausalLM",
    defaults=OLMO2.defaults
    | {
        "rope_theta": 500000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    keys=lambda config: {
        **OLMO2.keys(config),
        **windows_between_keys(config),
    },
    windows=windows_between,
    ropes=ropes_by_attention(),
    rope_keys=ropes_by_attention_keys,
)
