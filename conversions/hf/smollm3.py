"""SmolLM3: a Llama in which every fourth layer has no rotary positions."""

from conversions.hf.config_fields import ConfigFields
from conversions.hf.decoder import DECODER_RULES
from conversions.hf.family import Family
from conversions.hf.llama import LLAMA
from conversions.hf.windows import windows_by_layer, windows_by_layer_keys


def _layers_without_rope(fields: ConfigFields) -> tuple[int, ...]:
    """Returns the layers whose entry in `no_rope_layers` is 0, or every n-th."""
    layers = fields.integer("num_hidden_layers")
    turning = fields.get("no_rope_layers")
    if turning is None:
        n = fields.integer("no_rope_layer_interval")
        turning = [int((i + 1) % n != 0) for i in range(layers)]
    is_list = isinstance(turning, list) and len(turning) == layers
    if not is_list or any(entry not in (0, 1) for entry in turning):
        raise fields.error("no_rope_layers", f"{layers} entries, each 0 or 1")
    return tuple(i for i, entry in enumerate(turning) if not entry)


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    rules=DECODER_RULES,
    defaults=LLAMA.defaults
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 0,
        "layer_types": None,
    },
    switches=lambda fields: {
        **LLAMA.switches(fields),
        "layers_without_rope": _layers_without_rope(fields),
    },
    keys=lambda config: {
        **LLAMA.keys(config),
        **windows_by_layer_keys(config),
        "no_rope_layers": [
            int(i not in config.layers_without_rope)
            for i in range(config.num_hidden_layers)
        ],
    },
    windows=windows_by_layer,
)
