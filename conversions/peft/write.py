"""Weights -> PEFT adapter folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array

from conversions.peft.adapter_config import write_adapter_config
from conversions.peft.names import full_name, peft_key
from conversions.peft.read import ADAPTER_NAME
from conversions.rules import relaid
from conversions.safetensors_writer import write_safetensors
from fastjax.config import LoRAConfig
from fastjax.files import make_folder, new_file

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# LoRA adapter

Trained with fastjax on top of the base model named above. It loads in PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def write_adapter(
    folder: Path,
    weights: Mapping[str, Array],
    lora: LoRAConfig,
    *,
    base_model_name_or_path: str,
    revision: str | None = None,
) -> None:
    """Writes an adapter as PEFT does: float32 tensors, config and a model card.

    Args:
      folder: Made if it is not there; an older adapter in it is replaced.
      weights: Adapters and trained biases by our names.
      lora: Kind of the adapter.
      base_model_name_or_path: Folder or hub name of the base model.
      revision: Of the base model.

    Raises:
      ValueError: The weights are not those of one adapter.
      StorageError: The folder cannot be written.
    """
    adapted = _adapted(weights, lora)
    tensors = {}
    for name, array in weights.items():
        key, layout = peft_key(name, adapted)
        tensors[key] = relaid(np.asarray(array).astype(np.float32, copy=False), layout)
    make_folder(folder)
    write_safetensors(folder / ADAPTER_NAME, tensors)
    write_adapter_config(
        folder,
        lora,
        [full_name(module) for module in sorted(adapted)],
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
    )
    with new_file(folder / "README.md") as file:
        # JSON strings are YAML strings: no name can add lines to the front matter.
        card = _CARD.format(base=json.dumps(base_model_name_or_path))
        file.write(card.encode("utf-8"))


def _adapted(weights: Mapping[str, Array], lora: LoRAConfig) -> set[str]:
    """Returns the adapted modules, each of which has all its tensors of one rank."""
    leaves = {"lora_a", "lora_b"} | ({"lora_magnitude"} if lora.use_dora else set())
    held: dict[str, set[str]] = {}
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias":
            continue
        held.setdefault(module, set()).add(leaf)
        rank = {"lora_a": array.shape[-1], "lora_b": array.shape[0]}.get(leaf)
        if rank not in (None, lora.lora_r):
            raise ValueError(f"{name} has rank {rank}, not {lora.lora_r}")
    wrong = [module for module, found in held.items() if found != leaves]
    if wrong or not held:
        raise ValueError(f"each adapted module needs {leaves}; these do not: {wrong}")
    return set(held)
