"""Names of adapter tensors: ours <-> PEFT's."""

import re
from collections.abc import Set

from conversions.rules import Layout
from fastjax.target_modules import full_name

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = TABLES = ("embed_tokens", "lm_head")
_KEYS: dict[str, tuple[str, Layout]] = {
    "lora_a": ("lora_A.weight", "transpose"),
    "lora_b": ("lora_B.weight", "transpose"),
    "lora_b_bias": ("lora_B.bias", "identity"),
    "lora_magnitude": ("lora_magnitude_vector", "identity"),
}
_EMBEDDING_KEYS: dict[str, tuple[str, Layout]] = {
    "lora_a": ("lora_embedding_A", "transpose"),
    "lora_b": ("lora_embedding_B", "transpose"),
}
_TABLE_KEYS = {
    "weight": "weight",
    "rows": "token_adapter.trainable_tokens_delta",
}
_MAGNITUDE = ".lora_magnitude_vector"
_ADAPTER_NAME = re.compile(
    r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.default(?=\.|$)"
)


def is_of_table(name: str) -> bool:
    """Says whether a tensor of ours belongs to the embeddings or the output head."""
    return name.rpartition(".")[0] in TABLES


def peft_key(name: str, adapted: Set[str]) -> tuple[str, Layout]:
    """Returns PEFT's key and layout of one of our tensors.

    Args:
      name: Our name, such as "layers.0.self_attn.q_proj.lora_a".
      adapted: Our names of the modules with an adapter; PEFT wraps these, so that
        their own bias moves into "base_layer".

    Raises:
      ValueError: An adapter has no such tensor.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        inner = "base_layer.bias" if module in adapted else "bias"
        return f"{_PREFIX}{full_name(module)}.{inner}", "identity"
    if is_of_table(name) and leaf in _TABLE_KEYS:
        inner = "base_layer.weight" if module in adapted else _TABLE_KEYS[leaf]
        return f"{_PREFIX}{full_name(module)}.{inner}", "identity"
    keys = _EMBEDDING_KEYS if module == _EMBEDDING else _KEYS
    if leaf not in keys or module not in adapted:
        raise ValueError(f"{name} is not a tensor of an adapter")
    key, layout = keys[leaf]
    return f"{_PREFIX}{full_name(module)}.{key}", layout


def second_end_keys(adapted: Set[str]) -> dict[str, tuple[str, bool]]:
    """Returns the keys under which PEFT stores tied embeddings once more, as a head.

    Args:
      adapted: Our names of the modules with an adapter.

    Returns:
      Key of the head -> (that of the embeddings, whether it is transposed).
    """

    has_adapter = _EMBEDDING in adapted
    both = set(TABLES) if has_adapter else set[str]()
    ends = [("weight", "weight", False)]
    if has_adapter:
        ends += [("lora_a", "lora_b", True), ("lora_b", "lora_a", True)]
    return {
        peft_key(f"{_HEAD}.{leaf}", both)[0]: (
            peft_key(f"{_EMBEDDING}.{first}", both)[0],
            is_turned,
        )
        for leaf, first, is_turned in ends
    }


def plain_key(key: str) -> str:
    """Returns a PEFT key without the name of the adapter, which some writers keep."""
    key = _ADAPTER_NAME.sub(r".\1", key)
    return key.removesuffix(".weight") if _MAGNITUDE in key else key
