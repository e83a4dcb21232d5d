"""What a decoder-only transformer is: sizes and switches, no weights."""

import dataclasses
from typing import Literal

from fastjax.config import RopeScaling
from fastjax.errors import ConfigError
from fastjax.rope_config import RopeConfig as RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Sizes and switches of one decoder-only transformer; names as in Hugging Face.

    Attributes:
      family: Key of the family in `models.registry`, as `model_type` in config.json.
      hidden_act: "silu" makes a SwiGLU, "gelu_pytorch_tanh" a GeGLU.
      attention_bias: q, k and v projections have a bias.
      attention_out_bias: The o projection has a bias.
      mlp_bias: gate, up and down projections have a bias.
      qk_norm: q and k are RMS-normalised before RoPE: each head by itself ("head"),
        or all heads as one vector ("row").
      norm_offset: Added to every norm weight: 1.0 where files hold w of (1 + w).
      norm_placement: Attention and feed-forward network are normalised at their input
        ("before"), their output ("after"), or both ("around").
      has_fused_projections: q, k and v are one linear, `qkv_proj`; gate and up are
        one, `gate_up_proj`.
      rope: Rotary positions.
      local_rope: Those of layers with a sliding window; None: the same.
      layers_without_rope: Layers that turn nothing.
      attention_scale: Factor of the attention scores; None takes head_dim**-0.5.
      attention_softcap: Bound of the attention scores, `c * tanh(scores / c)`.
      logit_softcap: The same for the logits.
      embedding_scale: Factor of the embedded tokens.
      residual_scale: Factor of what each half of a layer adds.
      logit_scale: Factor of the logits.
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
    local_rope: RopeConfig | None = None
    layers_without_rope: tuple[int, ...] = ()
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "row"] | None = None
    norm_offset: float = 0.0
    norm_placement: Literal["before", "around", "after"] = "before"
    has_fused_projections: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
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
        if len(self.layer_windows) not in (1, self.num_hidden_layers):
            raise ConfigError(
                f"layer_windows has {len(self.layer_windows)} entries for "
                f"{self.num_hidden_layers} layers; give one a layer, or one for all"
            )
        for rope in set(self.ropes):
            self._check_rope(rope)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, one entry a layer."""
        if len(self.layer_windows) == self.num_hidden_layers:
            return self.layer_windows
        return self.layer_windows * self.num_hidden_layers

    @property
    def context_tokens(self) -> int:
        """Longest document that the positions reach, as vLLM derives it.

        Files say the context before a linear or dynamic stretch, unless only some
        layers are stretched.
        """
        rope, tokens = self.rope, self.max_position_embeddings
        if rope.kind == "yarn":
            reached = round(rope.original_max_position_embeddings * rope.factor)
            return max(tokens, reached)
        if rope.kind == "dynamic" or (rope.kind == "linear" and not self.local_rope):
            return round(tokens * rope.factor)
        return tokens

    def stretched(self, scaling: RopeScaling, tokens: int) -> "TransformerConfig":
        """Returns the model with a context of `tokens`, itself if that is no longer.

        Layers with a RoPE of their own for sliding windows keep it.

        Args:
          scaling: How RoPE is stretched; "none" changes nothing.
          tokens: Longest document.

        Raises:
          ConfigError: Its RoPE is stretched in another way already.
        """
        if scaling == "none" or tokens <= self.context_tokens:
            return self
        rope, trained = self.rope, self.max_position_embeddings
        factor = rope.factor * tokens / self.context_tokens
        if rope.kind == "yarn":
            trained = rope.original_max_position_embeddings
            factor = tokens / trained
        rope = rope.stretched(scaling, trained=trained, factor=factor)
        is_said = scaling == "yarn" or (scaling == "linear" and self.local_rope)
        return dataclasses.replace(
            self,
            rope=rope,
            max_position_embeddings=tokens if is_said else self.max_position_embeddings,
        )

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Rotary positions of each layer, one entry a layer."""
        still = dataclasses.replace(self.rope, kind="none")
        return tuple(
            still
            if layer in self.layers_without_rope
            else self.rope
            if window is None or self.local_rope is None
            else self.local_rope
            for layer, window in enumerate(self.windows)
        )

    def _check_rope(self, rope: RopeConfig) -> None:
        turning = rope.rotary_dim(self.head_dim)
        if turning % 2 or not 0 < turning <= self.head_dim:
            raise ConfigError(
                f"head_dim={self.head_dim} with {turning} turning features: these must "
                "be even for RoPE, and some"
            )
        if rope.kind == "longrope":
            counts = {len(rope.short_factors), len(rope.long_factors)}
            if counts != {turning // 2}:
                raise ConfigError(
                    f"longrope needs {turning // 2} short and long factors, "
                    f"not {len(rope.short_factors)} and {len(rope.long_factors)}"
                )


def _set(config: TransformerConfig, name: str, value: object) -> None:
    """Takes what scripts set on a model's config where it decides nothing here."""
    if name in _WITHOUT_EFFECT or (name == "pretraining_tp" and value == 1):
        return
    raise ConfigError(
        f"{name} of a model's config cannot be set: it is what the weights were made "
        "for",
        fix="leave the line out; what can be chosen are arguments of from_pretrained, "
        "as dtype, max_seq_length and rope_scaling, and of generate, as eos_token_id",
    )


# The cache is used by generate alone, and padding is the tokenizer's.
_WITHOUT_EFFECT = ("use_cache", "pad_token_id")
# The one that dataclasses give a frozen class with slots fails on other names.
TransformerConfig.__setattr__ = _set
