"""Names of adapter tensors: ours <-> PEFT's."""

import re
from collections.abc import Set

from conversions.rules import Layout

_PREFIX = "base_model.model."
_MODEL = "model."
_HEAD = "lm_head"
TABLES = ("embed_tokens", _HEAD)
_KEYS: dict[str, tuple[str, Layout]] = {
    "lora_a": ("lora_A.weight", "transpose"),
    "lora_b": ("lora_B.weight", "transpose"),
    "lora_magnitude": ("lora_magnitude_vector", "identity"),
}
_TABLE_KEYS = {
    "weight": "weight",
    "rows": "token_adapter.trainable_tokens_delta",
}
_MAGNITUDE = ".lora_magnitude_vector"
_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.default(?=\.|$)")


def full_name(module: str) -> str:
    """Returns Hugging Face's full name of one of our modules."""
    return module if module == _HEAD else _MODEL + module


def own_name(name: str) -> str:
    """Returns our name of a module from Hugging Face's full one."""
    return name.removeprefix(_MODEL)


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
        return f"{_PREFIX}{full_name(module)}.{_TABLE_KEYS[leaf]}", "identity"
    if leaf not in _KEYS or module not in adapted:
        raise ValueError(f"{name} is not a tensor of an adapter")
    key, layout = _KEYS[leaf]
    return f"{_PREFIX}{full_name(module)}.{key}", layout


def plain_key(key: str) -> str:
    """Returns a PEFT key without the name of the adapter, which some writers keep."""
    key = _ADAPTER_NAME.sub(r".\1", key)
    return key.removesuffix(".weight") if _MAGNITUDE in key else key
