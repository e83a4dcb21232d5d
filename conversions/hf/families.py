"""Checkpoint formats by `model_type`."""

import difflib
from collections.abc import Mapping

from conversions.hf.family import Family
from conversions.hf.gemma2 import GEMMA2
from conversions.hf.gemma3 import GEMMA3
from conversions.hf.granite import GRANITE
from conversions.hf.llama import LLAMA
from conversions.hf.mistral import MISTRAL
from conversions.hf.olmo2 import OLMO2
from conversions.hf.olmo3 import OLMO3
from conversions.hf.phi3 import PHI3
from conversions.hf.qwen2 import QWEN2
from conversions.hf.qwen3 import QWEN3
from conversions.hf.smollm3 import SMOLLM3
from conversions.rules import Tensor, model_tensors
from fastjax.errors import ModelError, printable
from fastjax.models.transformer_config import TransformerConfig

FAMILIES: dict[str, Family] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
}

_EXPERTS = "mixture of experts"
_VISION = "vision and text in one checkpoint"
_PARALLEL = "attention and feed-forward network side by side, with LayerNorm"
_STATE_SPACE = "state-space layers"
# What other architectures have that no family here has, and who is nearest to them.
_NEAREST: dict[str, tuple[str, str]] = {
    "cohere": ("llama", _PARALLEL),
    "cohere2": ("gemma2", _PARALLEL),
    "deepseek_v2": ("llama", f"latent attention and {_EXPERTS}"),
    "deepseek_v3": ("llama", f"latent attention and {_EXPERTS}"),
    "exaone4": ("olmo3", "its own naming of tensors"),
    "falcon": ("llama", _PARALLEL),
    "falcon_h1": ("llama", _STATE_SPACE),
    "gemma": ("gemma2", "norms at the input of each half only"),
    "gemma3": ("gemma3_text", _VISION),
    "gemma3n": ("gemma3_text", "embeddings by layer"),
    "glm4": ("llama", "RoPE over neighbouring features"),
    "gpt2": ("llama", "learned positions and LayerNorm"),
    "gpt_neox": ("llama", _PARALLEL),
    "gpt_oss": ("qwen3", f"attention sinks and {_EXPERTS}"),
    "granitemoe": ("granite", _EXPERTS),
    "granitemoehybrid": ("granite", f"{_STATE_SPACE} and {_EXPERTS}"),
    "llama4": ("llama", f"{_EXPERTS} and {_VISION}"),
    "llama4_text": ("llama", _EXPERTS),
    "mamba": ("llama", _STATE_SPACE),
    "mamba2": ("llama", _STATE_SPACE),
    "mistral3": ("mistral", _VISION),
    "mixtral": ("mistral", _EXPERTS),
    "mllama": ("llama", _VISION),
    "olmo": ("olmo2", "norms without weights"),
    "olmoe": ("olmo2", _EXPERTS),
    "phi": ("phi3", _PARALLEL),
    "phi4_multimodal": ("phi3", "vision, speech and text in one checkpoint"),
    "phimoe": ("phi3", _EXPERTS),
    "qwen2_5_vl": ("qwen2", _VISION),
    "qwen2_moe": ("qwen2", _EXPERTS),
    "qwen2_vl": ("qwen2", _VISION),
    "qwen3_moe": ("qwen3", _EXPERTS),
    "qwen3_next": ("qwen3", f"linear attention and {_EXPERTS}"),
    "qwen3_vl": ("qwen3", _VISION),
    "starcoder2": ("mistral", "a feed-forward network without gate, and LayerNorm"),
    "stablelm": ("llama", "LayerNorm"),
}


# Keys of config.json that tell what an architecture has that nobody lists.
_SIGNS: dict[str, str] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _EXPERTS),
    **dict.fromkeys(("vision_config", "audio_config"), "other inputs than text"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), "LayerNorm"),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_cfg"), _STATE_SPACE),
    "kv_lora_rank": "latent attention",
    "linear_num_key_heads": "linear attention",
    "num_decoder_layers": "an encoder beside the decoder",
}
_PLAINEST = "llama"


def find_family(
    model_type: object, *, where: str, values: Mapping[str, object] | None = None
) -> Family:
    """Returns the format of a `model_type`.

    Args:
      model_type: Of config.json.
      where: That file, for errors.
      values: Its content, which tells of an unknown model what it has.

    Raises:
      ModelError: Names the nearest supported one, what the model has that it has not,
        and all that are supported.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    shown = printable(repr(model_type))
    fix = f"use a model of one of these families: {', '.join(FAMILIES)}"
    if isinstance(model_type, str) and model_type in _NEAREST:
        nearest, missing = _NEAREST[model_type]
        raise ModelError(
            f"model_type={shown} is not supported: it has {missing}; the nearest "
            f"supported one is {nearest}",
            where=where,
            fix=fix,
        )
    near = difflib.get_close_matches(str(model_type)[:100], FAMILIES, n=1)
    found = dict.fromkeys(_SIGNS[key] for key in _SIGNS if (values or {}).get(key))
    missing = f"it has {' and '.join(found)}" if found else "its layers are not known"
    raise ModelError(
        f"model_type={shown} is not supported: {missing}; the nearest supported one "
        f"is {(near or [_PLAINEST])[0]}",
        where=where,
        fix=f"{fix}; docs/adding_a_model_family.md says how to add one",
    )


def checkpoint_tensors(config: TransformerConfig) -> tuple[Tensor, ...]:
    """Returns exactly the tensors that a checkpoint of this model holds."""
    family = find_family(config.family, where="TransformerConfig.family")
    return model_tensors(family.rules, config)
