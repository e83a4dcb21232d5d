"""Granite 3.3 (2408.13359): a Llama with factors in four places."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig


def _config(
    hidden: int, feed_forward: int, *, scores: float, logits: float
) -> TransformerConfig:
    return TransformerConfig(
        family="granite",
        vocab_size=49159,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=hidden // 32,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e7),
        tie_word_embeddings=True,
        attention_scale=scores,
        embedding_scale=12.0,
        residual_scale=0.22,
        logit_scale=1.0 / logits,
        bos_token_id=0,
        eos_token_ids=(0,),
        pad_token_id=0,
    )


_CONFIGS = {
    "2b": _config(2048, 8192, scores=1 / 64, logits=8.0),
    "8b": _config(4096, 12800, scores=1 / 128, logits=16.0),
}

PRESETS = {
    f"granite3.3-{size}{'' if kind == 'base' else '-instruct'}": Preset(
        hub_id=f"ibm-granite/granite-3.3-{size}-{kind}", config=config
    )
    for size, config in _CONFIGS.items()
    for kind in ("base", "instruct")
}
