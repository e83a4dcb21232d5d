"""What a decoder-only transformer is: sizes and switches, no weights."""

import dataclasses
from typing import Literal

from fastjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (2104.09864) and how it is stretched.

    Attributes:
      kind: "default"; "linear" divides the positions by `factor`; "llama3" divides
        only the low frequencies (Llama 3.1 model card).
      theta: Base of the geometric series of wavelengths.
      factor: How many times longer the stretched context is.
      low_freq_factor: Wavelengths above `original_max_position_embeddings` over this
        are divided by the whole `factor` ("llama3").
      high_freq_factor: Wavelengths below `original_max_position_embeddings` over this
        stay as they are ("llama3").
      original_max_position_embeddings: Context of pre-training in tokens ("llama3").
    """

    kind: Literal["default", "linear", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Sizes and switches of one decoder-only transformer; names as in Hugging Face.

    Attributes:
      family: Key of the family in `models.registry`, as `model_type` in config.json.
      hidden_act: "silu" makes a SwiGLU, "gelu_pytorch_tanh" a GeGLU.
      attention_bias: q, k and v projections have a bias.
      attention_out_bias: The o projection has a bias.
      mlp_bias: gate, up and down projections have a bias.
      qk_norm: q and k are RMS-normalised per head, before RoPE.
      norm_offset: Added to every norm weight: 1.0 where files hold w of (1 + w).
      layer_windows: Sliding window in tokens of each layer, None for full attention;
        one entry a layer, or one entry for all.
      bos_token_id: First token of a text, when the model wants one.
      eos_token_ids: Any of them ends a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    layer_windows: tuple[int | None, ...] = (None,)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes += ("num_attention_heads", "num_key_value_heads", "head_dim")
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for RoPE")
        if len(self.layer_windows) not in (1, self.num_hidden_layers):
            raise ConfigError(
                f"layer_windows has {len(self.layer_windows)} entries for "
                f"{self.num_hidden_layers} layers; give one a layer, or one for all"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, one entry a layer."""
        if len(self.layer_windows) == self.num_hidden_layers:
            return self.layer_windows
        return self.layer_windows * self.num_hidden_layers
