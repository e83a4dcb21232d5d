"""Checkpoint formats by `model_type`."""

import difflib

from conversions.hf.family import Family
from conversions.hf.llama import LLAMA
from conversions.hf.mistral import MISTRAL
from conversions.hf.qwen2 import QWEN2
from conversions.hf.qwen3 import QWEN3
from conversions.rules import Tensor, model_tensors
from fastjax.errors import ModelError, printable
from fastjax.models.transformer_config import TransformerConfig

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def find_family(model_type: object, *, where: str) -> Family:
    """Returns the format of a `model_type`.

    Raises:
      ModelError: Names the nearest supported one and all of them.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type)[:100], FAMILIES, n=1)
    hint = f"; the nearest supported one is {near[0]}" if near else ""
    raise ModelError(
        f"model_type={printable(repr(model_type))} is not supported{hint}",
        where=where,
        fix=f"use a model of one of these families: {', '.join(FAMILIES)}",
    )


def checkpoint_tensors(config: TransformerConfig) -> tuple[Tensor, ...]:
    """Returns exactly the tensors that a checkpoint of this model holds."""
    family = find_family(config.family, where="TransformerConfig.family")
    return model_tensors(family.rules, config)
