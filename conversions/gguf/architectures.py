"""What llama.cpp calls the tensors and sizes of each family."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from conversions.gguf.file import Value
from fastjax.errors import ModelError
from fastjax.models.transformer_config import TransformerConfig
from fastjax.rope_config import RopeConfig, yarn_attention_factor

_ROPES = ("default", "linear", "llama3", "yarn")
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
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTPUT_NORMS = {"post_attention_layernorm": "post_attention_norm"}
_GELU = "gelu_pytorch_tanh"
_LAYERS_OF_GEMMA2_27B = 46


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp holds one family.

    Attributes:
      name: `general.architecture`.
      hidden_act: The only activation that it computes.
      ropes: Kinds of RoPE that it knows.
      window_period: Every so manieth layer has no window; None ignores windows.
      pairs_neighbours: RoPE turns features 2i and 2i+1 together, so the rows of q and
        k change places; else features i and i + H/2, as in Hugging Face.
      metadata: Keys that only this architecture has.
    """

    name: str
    hidden_act: str = "silu"
    pairs_neighbours: bool = False
    ropes: tuple[str, ...] = _ROPES
    window_period: int | None = None
    metadata: Callable[[TransformerConfig], Mapping[str, Value]] = lambda config: {}


_LLAMA = Architecture(
    name="llama",
    pairs_neighbours=True,
    metadata=lambda config: {
        "vocab_size": np.uint32(config.vocab_size),
        "rope.dimension_count": np.uint32(config.head_dim),
    },
)


def _window(config: TransformerConfig) -> dict[str, Value]:
    sizes = {window for window in config.windows if window is not None}
    return {"attention.sliding_window": np.uint32(max(sizes))} if sizes else {}


def _gemma2_metadata(config: TransformerConfig) -> dict[str, Value]:
    return _window(config) | {
        "attn_logit_softcapping": np.float32(config.attention_softcap or 0),
        "final_logit_softcapping": np.float32(config.logit_softcap or 0),
    }


def _gemma3_metadata(config: TransformerConfig) -> dict[str, Value]:
    local = config.local_rope or config.rope
    return _window(config) | {"rope.freq_base_swa": np.float32(local.theta)}


def _phi3_metadata(config: TransformerConfig) -> dict[str, Value]:
    rope = config.rope
    keys: dict[str, Value] = {
        "rope.dimension_count": np.uint32(rope.rotary_dim(config.head_dim))
    }
    if rope.kind == "longrope":
        trained = rope.original_max_position_embeddings
        keys["rope.scaling.original_context_length"] = np.uint32(trained)
        keys["rope.scaling.attn_factor"] = np.float32(rope.attention_factor)
    return keys


ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": Architecture(
        name="gemma2",
        hidden_act=_GELU,
        ropes=("default",),
        window_period=2,
        metadata=_gemma2_metadata,
    ),
    "gemma3_text": Architecture(
        name="gemma3",
        hidden_act=_GELU,
        ropes=("default", "linear"),
        window_period=6,
        metadata=_gemma3_metadata,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": Architecture(
        name="phi3", ropes=("default", "longrope"), metadata=_phi3_metadata
    ),
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
    differing = [name for name, is_so in _fixed(config, found).items() if not is_so]
    if differing:
        raise ModelError(
            f"llama.cpp computes {config.family} with another {', '.join(differing)} "
            "than this model's",
            fix="write a merged folder and use transformers or vLLM",
        )
    if config.rope.kind not in found.ropes:
        raise ModelError(
            f"rope_type={config.rope.kind} is not written as GGUF for {config.family}",
            fix=f"these are: {', '.join(found.ropes)}; for others write a merged "
            "folder and use transformers or vLLM",
        )
    return found


def _fixed(config: TransformerConfig, found: Architecture) -> dict[str, bool]:
    """Returns what the files have no key for, and whether the model has it so."""
    scale = config.head_dim**-0.5
    if config.family == "gemma2" and config.num_hidden_layers == _LAYERS_OF_GEMMA2_27B:
        scale = (config.hidden_size / config.num_attention_heads) ** -0.5
    is_gemma = found.hidden_act == _GELU
    factor = config.hidden_size**0.5 if is_gemma else 1.0
    period = found.window_period
    has_place = [
        (window is None) == (layer % period == period - 1)
        for layer, window in enumerate(config.windows)
        if period is not None
    ]
    rope, local = config.rope, config.local_rope
    plain = RopeConfig(kind="yarn", factor=rope.factor)
    kept = ("beta_fast", "beta_slow", "truncate")
    is_yarn = rope.kind != "yarn" or (
        all(getattr(rope, key) == getattr(plain, key) for key in kept)
        and math.isclose(rope.attention_factor, yarn_attention_factor(rope.factor))
    )
    width = config.num_attention_heads * config.head_dim
    return {
        "attention scale": math.isclose(config.attention_scale or scale, scale),
        "embedding scale": math.isclose(config.embedding_scale, factor, rel_tol=1e-2),
        "pattern of sliding windows": all(has_place),
        "soft bound of the logits": is_gemma or config.logit_softcap is None,
        "RoPE of sliding layers": local is None or local.kind == "default",
        "kind of yarn": is_yarn,
        "width of the heads": not config.has_fused_projections
        or width == config.hidden_size,
    }


def gguf_name(name: str, config: TransformerConfig) -> str:
    """Returns llama.cpp's name of one of our weights."""
    module, _, leaf = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"blk.{layer}."
    names = _NAMES
    if config.norm_placement != "before":
        names = _NAMES | _OUTPUT_NORMS
    return f"{prefix}{names[module]}.{leaf}"


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
        "context_length": np.uint32(config.context_tokens),
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
    if config.rope.kind == "yarn":
        trained = config.rope.original_max_position_embeddings
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = np.float32(config.rope.factor)
        keys["rope.scaling.original_context_length"] = np.uint32(trained)
    keys |= architecture.metadata(config)
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def rope_tensors(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Returns what the wavelengths of single features are stretched by, if they are."""
    rope = config.rope
    if rope.kind == "longrope":
        sides = {"long": rope.long_factors, "short": rope.short_factors}
        return {
            f"rope_factors_{side}.weight": np.asarray(factors, np.float32)
            for side, factors in sides.items()
        }
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
    remarks = []
    if config.rope.kind == "longrope":
        trained = config.rope.original_max_position_embeddings
        remarks = [
            "llama.cpp takes the long or the short factors of RoPE by the size of its "
            f"context: give it at most {trained} tokens (-c {trained}) for short texts"
        ]
    if windows and architecture_of(config).window_period is None:
        return [
            *remarks,
            f"llama.cpp ignores the sliding window of {min(windows)} tokens of "
            f"{config.family} models: longer texts give other answers there",
        ]
    return remarks
