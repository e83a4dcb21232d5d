"""Weights -> PEFT adapter folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from conversions.peft.adapter_config import CONFIG_NAME, LOFTQ, plain_number
from conversions.peft.names import TABLES, peft_key, second_end_keys
from conversions.peft.read import ADAPTER_NAME
from conversions.peft.stretch import Stretch
from conversions.rules import relaid
from conversions.safetensors_writer import write_safetensors
from fastjax.config import ALL_LINEAR, LoRAConfig
from fastjax.files import make_folder, new_file
from fastjax.target_modules import full_name

PEFT_VERSION = "0.21.2"
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
    is_tied: bool = False,
    stretch: Stretch | None = None,
) -> None:
    """Writes an adapter as PEFT does: float32 tensors, config and a model card.

    Args:
      folder: Made if it is not there; an older adapter in it is replaced.
      weights: Adapters and trained biases by our names.
      lora: Kind of the adapter.
      base_model_name_or_path: Folder or hub name of the base model.
      revision: Of the base model.
      is_tied: Its embeddings are its output head as well.
      stretch: Of the base's context in training; see `stretch_of`.

    Raises:
      ValueError: The weights are not those of one adapter.
      StorageError: The folder cannot be written.
    """
    adapted = _adapted(weights, lora)
    tensors = {}
    for name, array in weights.items():
        key, layout = peft_key(name, adapted)
        module, _, leaf = name.rpartition(".")
        host = np.asarray(array)
        if leaf != "weight" or module not in adapted:
            host = host.astype(np.float32, copy=False)
        tensors[key] = relaid(host, layout)
    for second, (first, is_turned) in second_end_keys(adapted).items():
        if is_tied and first in tensors:
            same = tensors[first]
            tensors[second] = np.ascontiguousarray(same.T) if is_turned else same
    make_folder(folder)
    notes = {} if stretch is None else stretch.notes()
    write_safetensors(folder / ADAPTER_NAME, tensors, notes)
    _write_config(
        folder,
        lora,
        sorted(adapted),
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        is_tied=is_tied,
    )
    with new_file(folder / "README.md") as file:
        # JSON strings are YAML strings: no name can add lines to the front matter.
        card = _CARD.format(base=json.dumps(base_model_name_or_path))
        card += "" if stretch is None else stretch.card(base_model_name_or_path)
        file.write(card.encode("utf-8"))


def _write_config(
    folder: Path,
    lora: LoRAConfig,
    modules: Sequence[str],
    *,
    base_model_name_or_path: str,
    revision: str | None,
    is_tied: bool,
) -> None:
    """Writes the keys that every version of PEFT understands, sorted.

    Keys that only newer versions know are written where they say something.

    Args:
      folder: Folder of the adapter.
      lora: Kind of the adapter.
      modules: Our names of the adapted modules, which replace "all-linear".
      base_model_name_or_path: Folder or hub name of the base model.
      revision: Of the base model.
      is_tied: Its embeddings are its output head as well.
    """
    target = lora.lora_target_modules
    # PEFT takes no expression together with layers_to_transform.
    is_listed = target == ALL_LINEAR or bool(lora.layers_to_transform)
    names = [full_name(module) for module in modules]
    listed = names if is_listed and isinstance(target, str) else target
    start = lora.init_lora_weights
    values = {
        "alpha_pattern": _as_object(lora.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": lora.lora_bias,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if start == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "lora_alpha": plain_number(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": list(lora.modules_to_save) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": lora.lora_r,
        "rank_pattern": _as_object(lora.rank_pattern),
        "revision": revision,
        "target_modules": listed if isinstance(listed, str) else sorted(listed),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    values |= _newer_keys(lora, modules, is_tied=is_tied)
    values = dict(sorted(values.items()))
    with new_file(folder / CONFIG_NAME) as file:
        file.write(json.dumps(values, indent=2).encode("utf-8"))


def _newer_keys(
    lora: LoRAConfig, modules: Sequence[str], *, is_tied: bool
) -> dict[str, Any]:
    """Returns the keys of newer versions that say something, and what they replace."""
    values: dict[str, Any] = {}
    if lora.init_lora_weights == "loftq":
        values["loftq_config"] = LOFTQ
    if lora.trainable_token_indices:
        values["trainable_token_indices"] = list(lora.trainable_token_indices)
    if lora.lora_b_bias:
        values["lora_bias"] = True
    if is_tied and (lora.modules_to_save or TABLES[0] in modules):
        values["ensure_weight_tying"] = True
    if is_tied and lora.modules_to_save:
        values["modules_to_save"] = TABLES[:1]
    return values


def _as_object(pattern: tuple[str, ...]) -> dict[str, float | int]:
    pairs = (entry.rpartition("=") for entry in pattern)
    return {expression: plain_number(float(number)) for expression, _, number in pairs}


def _adapted(weights: Mapping[str, Array], lora: LoRAConfig) -> set[str]:
    """Returns the adapted modules, each of which has all its tensors of its rank."""
    leaves = {"lora_a", "lora_b"} | ({"lora_magnitude"} if lora.use_dora else set())
    leaves |= {"lora_b_bias"} if lora.lora_b_bias else set()
    held: dict[str, set[str]] = {}
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("bias", "weight", "rows"):
            continue
        held.setdefault(module, set()).add(leaf)
        rank = {"lora_a": array.shape[-1], "lora_b": array.shape[0]}.get(leaf)
        expected = lora.rank(full_name(module))
        if rank not in (None, expected):
            raise ValueError(f"{name} has rank {rank}, not {expected}")
    wrong = [module for module, found in held.items() if found != leaves]
    if wrong or not held:
        raise ValueError(f"each adapted module needs {leaves}; these do not: {wrong}")
    return set(held)
