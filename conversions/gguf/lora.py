"""An adapter as a GGUF file, to be used beside the base model's file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array

from conversions.gguf.architectures import (
    architecture_of,
    gguf_name,
    heads_to_reorder,
    reordered_rows,
)
from conversions.gguf.file import GGUFTensor, gguf_writer
from fastjax.errors import ModelError
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.linear import AdapterSpec

_SIDES = {"lora_a": ".lora_a", "lora_b": ".lora_b"}


def write_gguf_lora(
    path: Path,
    weights: Mapping[str, Array | np.ndarray],
    config: TransformerConfig,
    adapters: Mapping[str, AdapterSpec],
) -> None:
    """Writes an adapter in float32.

    llama.cpp multiplies every product by alpha / R with one alpha for all. Where ours
    are of one such alpha it is written; else the up projections take the factors.

    Args:
      path: New file; an older one is replaced.
      weights: Down and up projections by our names.
      config: What the base model is.
      adapters: Rank and scaling of each adapted module.

    Raises:
      ModelError: The adapter has parts that the format has no place for.
    """
    if any(adapter.is_dora for adapter in adapters.values()):
        raise _no_place("DoRA's magnitudes")
    alphas = {a.scaling * a.rank for a in adapters.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _SIDES or module in ("embed_tokens", "lm_head"):
            raise _no_place(f"{name}, a trained weight")
        rows = np.asarray(array).astype(np.float32).T
        if leaf == "lora_b":
            heads = heads_to_reorder(f"{module}.weight", config)
            rows = rows if heads is None else reordered_rows(rows, heads)
            adapter = adapters[module]
            rows = rows * np.float32(adapter.scaling * adapter.rank / alpha)
        tensors[gguf_name(f"{module}.weight", config) + _SIDES[leaf]] = rows
    metadata = {
        "general.architecture": architecture_of(config).name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }
    specs = {name: GGUFTensor(rows.shape, "f32") for name, rows in tensors.items()}
    with gguf_writer(path, metadata, specs) as put:
        for name, rows in tensors.items():
            put(name, rows)


def _no_place(what: str) -> ModelError:
    return ModelError(
        f"a GGUF adapter has no place for {what}",
        fix="merge the adapter and write the whole model: --format gguf",
    )
