"""What llama.cpp calls the tensors and sizes of each family."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from conversions.gguf.file import Value
from fastjax.errors import ModelError
from fastjax.models.transformer_config import TransformerConfig

_ROPES = ("default", "linear", "llama3")
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp holds one family.

    Attributes:
      name: `general.architecture`.
      hidden_act: The only activation that it computes.
      pairs_neighbours: RoPE turns features 2i and 2i+1 together, so the rows of q and
        k change places; else features i and i + H/2, as in Hugging Face.
      metadata: Keys that only this architecture has.
    """

    name: str
    hidden_act: str = "silu"
    pairs_neighbours: bool = False
    metadata: Callable[[TransformerConfig], Mapping[str, Value]] = lambda config: {}


_LLAMA = Architecture(
    name="llama",
    pairs_neighbours=True,
    metadata=lambda config: {
        "vocab_size": np.uint32(config.vocab_size),
        "rope.dimension_count": np.uint32(config.head_dim),
    },
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
}


def architecture_of(config: TransformerConfig) -> Architecture:
    """Returns how llama.cpp holds a model.

    Raises:
      ModelError: It does not know the family, or computes it differently.
    """
    found = ARCHITECTURES.get(config.family)
    if found is None:
        raise ModelError(
            f"{config.family} models are not written as GGUF",
            fix=f"these are: {', '.join(ARCHITECTURES)}; for others write a merged "
            "folder and use llama.cpp's own converter",
        )
    if config.hidden_act != found.hidden_act:
        raise ModelError(
            f"llama.cpp computes {config.family} with {found.hidden_act}, this model "
            f"has hidden_act={config.hidden_act}"
        )
    if config.rope.kind not in _ROPES:
        raise ModelError(
            f"rope_type={config.rope.kind} is not written as GGUF",
            fix=f"these are: {', '.join(_ROPES)}; for others write a merged folder and "
            "use llama.cpp's own converter",
        )
    return found


def gguf_name(name: str, config: TransformerConfig) -> str:
    """Returns llama.cpp's name of one of our weights."""
    module, _, leaf = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"blk.{layer}."
    return f"{prefix}{_NAMES[module]}.{leaf}"


def heads_to_reorder(name: str, config: TransformerConfig) -> int | None:
    """Returns the heads of a q or k weight whose rows llama.cpp wants in its order."""
    if not architecture_of(config).pairs_neighbours:
        return None
    module = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module)


def reordered_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows (heads, 2, H/2) as (heads, H/2, 2): pairs become neighbours."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def model_metadata(config: TransformerConfig) -> dict[str, Value]:
    """Returns the sizes and positions of a model under llama.cpp's keys."""
    architecture = architecture_of(config)
    keys: dict[str, Value] = {
        "context_length": np.uint32(config.max_position_embeddings),
        "embedding_length": np.uint32(config.hidden_size),
        "block_count": np.uint32(config.num_hidden_layers),
        "feed_forward_length": np.uint32(config.intermediate_size),
        "attention.head_count": np.uint32(config.num_attention_heads),
        "attention.head_count_kv": np.uint32(config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "attention.key_length": np.uint32(config.head_dim),
        "attention.value_length": np.uint32(config.head_dim),
        "rope.freq_base": np.float32(config.rope.theta),
    }
    if config.rope.kind == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = np.float32(config.rope.factor)
    keys |= architecture.metadata(config)
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def rope_tensors(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Returns what the wavelengths of single features are stretched by, if they are."""
    rope = config.rope
    if rope.kind != "llama3":
        return {}
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = rope.original_max_position_embeddings / (2 * np.pi * rope.theta**exponents)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
    stretch = 1 / ((1 - kept) / rope.factor + kept)
    return {"rope_freqs.weight": stretch.astype(np.float32)}


def differences(config: TransformerConfig) -> list[str]:
    """Returns what llama.cpp will compute otherwise, one sentence each."""
    windows = {window for window in config.windows if window is not None}
    if windows:
        return [
            f"llama.cpp ignores the sliding window of {min(windows)} tokens of "
            f"{config.family} models: longer texts give other answers there"
        ]
    return []
