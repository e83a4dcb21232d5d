"""Gemma 2 (2408.00118) and the text models of Gemma 3 (2503.19786)."""

from fastjax.models.preset import Preset
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

_END, _END_OF_TURN = 1, {"gemma2": 107, "gemma3_text": 106}


def _config(
    family: str,
    sizes: tuple[int, int, int, int, int, int],
    *,
    scores: int = 256,
    is_instruct: bool,
) -> TransformerConfig:
    hidden, feed_forward, layers, heads, kv_heads, head_dim = sizes
    is_third = family == "gemma3_text"
    window, pattern = (512, 6) if is_third else (4096, 2)
    stops = (_END, _END_OF_TURN[family]) if is_instruct else (_END,)
    return TransformerConfig(
        family=family,
        vocab_size=262144 if is_third else 256000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768 if is_third else 8192,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6 if is_third else 1e4),
        local_rope=RopeConfig(theta=1e4) if is_third else None,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        qk_norm="head" if is_third else None,
        norm_offset=1.0,
        norm_placement="around",
        attention_scale=scores**-0.5,
        attention_softcap=None if is_third else 50.0,
        logit_softcap=None if is_third else 30.0,
        embedding_scale=hidden**0.5,
        layer_windows=tuple(
            window if (layer + 1) % pattern else None for layer in range(layers)
        ),
        bos_token_id=2,
        eos_token_ids=stops,
        pad_token_id=0,
    )


# hidden, feed-forward, layers, heads, kv heads, head size; queries are divided by the
# root of the last number
_SIZES = {
    "gemma2-2b": ("gemma2", "gemma-2-2b", (2304, 9216, 26, 8, 4, 256), 256),
    "gemma2-9b": ("gemma2", "gemma-2-9b", (3584, 14336, 42, 16, 8, 256), 256),
    "gemma2-27b": ("gemma2", "gemma-2-27b", (4608, 36864, 46, 32, 16, 128), 144),
    "gemma3-270m": ("gemma3_text", "gemma-3-270m", (640, 2048, 18, 4, 1, 256), 256),
    "gemma3-1b": ("gemma3_text", "gemma-3-1b", (1152, 6912, 26, 4, 1, 256), 256),
}
_BASE_SUFFIX = {"gemma-3-1b": "-pt"}

PRESETS = {
    name + ("-it" if is_instruct else ""): Preset(
        hub_id=f"google/{hub}{'-it' if is_instruct else _BASE_SUFFIX.get(hub, '')}",
        config=_config(family, sizes, scores=scores, is_instruct=is_instruct),
    )
    for name, (family, hub, sizes, scores) in _SIZES.items()
    for is_instruct in (False, True)
}
