"""Tensors that every family of plain decoders has."""

from conversions.rules import WeightRule
from fastjax.models.transformer_config import TransformerConfig

_LAYER = "layers.{i}."


def _layer_rule(name: str, shape: str, **options) -> WeightRule:
    name = _LAYER + name
    return WeightRule(hf="model." + name, name=name, shape=shape, **options)


def _linear(name: str, shape: str, **options) -> WeightRule:
    return _layer_rule(f"{name}.weight", shape, layout="transpose", **options)


def _is_fused(config: TransformerConfig) -> bool:
    return config.has_fused_projections


def _is_split(config: TransformerConfig) -> bool:
    return not config.has_fused_projections


DECODER_RULES = (
    WeightRule(hf="model.embed_tokens.weight", name="embed_tokens.weight", shape="V D"),
    _layer_rule(
        "input_layernorm.weight", "D", when=lambda c: c.norm_placement != "after"
    ),
    _linear("self_attn.q_proj", "NH D", when=_is_split),
    _linear("self_attn.k_proj", "KH D", when=_is_split),
    _linear("self_attn.v_proj", "KH D", when=_is_split),
    _linear("self_attn.qkv_proj", "QKV D", when=_is_fused),
    _linear("self_attn.o_proj", "D NH"),
    _layer_rule("self_attn.q_proj.bias", "NH", when=lambda c: c.attention_bias),
    _layer_rule("self_attn.k_proj.bias", "KH", when=lambda c: c.attention_bias),
    _layer_rule("self_attn.v_proj.bias", "KH", when=lambda c: c.attention_bias),
    _layer_rule("self_attn.o_proj.bias", "D", when=lambda c: c.attention_out_bias),
    _layer_rule("self_attn.q_norm.weight", "H", when=lambda c: c.qk_norm == "head"),
    _layer_rule("self_attn.k_norm.weight", "H", when=lambda c: c.qk_norm == "head"),
    _layer_rule("self_attn.q_norm.weight", "NH", when=lambda c: c.qk_norm == "row"),
    _layer_rule("self_attn.k_norm.weight", "KH", when=lambda c: c.qk_norm == "row"),
    _layer_rule("post_attention_layernorm.weight", "D"),
    _layer_rule(
        "pre_feedforward_layernorm.weight",
        "D",
        when=lambda c: c.norm_placement == "around",
    ),
    _layer_rule(
        "post_feedforward_layernorm.weight",
        "D",
        when=lambda c: c.norm_placement != "before",
    ),
    _linear("mlp.gate_proj", "F D", when=_is_split),
    _linear("mlp.up_proj", "F D", when=_is_split),
    _linear("mlp.gate_up_proj", "FF D", when=_is_fused),
    _linear("mlp.down_proj", "D F"),
    _layer_rule("mlp.gate_proj.bias", "F", when=lambda c: c.mlp_bias),
    _layer_rule("mlp.up_proj.bias", "F", when=lambda c: c.mlp_bias),
    _layer_rule("mlp.down_proj.bias", "D", when=lambda c: c.mlp_bias),
    WeightRule(hf="model.norm.weight", name="norm.weight", shape="D"),
    WeightRule(
        hf="lm_head.weight",
        name="lm_head.weight",
        shape="V D",
        when=lambda c: not c.tie_word_embeddings,
    ),
)
