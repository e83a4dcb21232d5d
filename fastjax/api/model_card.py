"""The README.md of a result: what it was made of, how well it does, how to load it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastjax import files
from fastjax.api.language_model import LanguageModel
from fastjax.config import TrainConfig
from fastjax.errors import printable
from fastjax.quantize import wanted_format
from fastjax.train import TrainResult
from fastjax.train.record import environment

_LOADING = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
_LICENCE = re.compile(r"^license:\s*([\w.+-]{1,64})\s*$", re.MULTILINE)
_HEAD_BYTES = 1 << 16


def write_model_card(
    folder: Path,
    model: LanguageModel,
    config: TrainConfig,
    result: TrainResult,
    *,
    data: str,
) -> None:
    """Writes the card over the short one that comes with an adapter.

    Args:
      folder: Of the result.
      model: That was trained.
      config: Of the run.
      result: Its outcome.
      data: Fingerprint of the training batches.

    Raises:
      StorageError: It cannot be written.
    """
    is_adapter = model.lora is not None
    facts = {
        "base model": model.source.name,
        "revision": model.source.revision or "not of the hub",
        "data": config.data.dataset_name or "questions on Python's standard library",
        "data hash": data,
        "steps": result.step,
        "tokens": result.metrics.get("num_tokens"),
        **_settings(config, is_adapter=is_adapter),
        "licence of the base": base_licence(model.source.folder) or "see the base",
    }
    versions = environment(config)
    names = ("fastjax", "jax", "flax", "device")
    parts = [
        _front_matter(model, is_adapter=is_adapter),
        f"# {'LoRA adapter' if is_adapter else 'Fine-tuned model'}\n",
        _table("", facts),
        _table("Results", dict(_numbers(result.metrics))),
        _table("Versions", {name: versions.get(name) for name in names}),
        "`config.yaml` runs again as it is; `run.json` has the rest.\n",
        _loading(model) if is_adapter else "",
    ]
    with files.storage_errors("write the model card", folder):
        files.write_atomic(folder / "README.md", "\n".join(filter(None, parts)))


def _loading(model: LanguageModel) -> str:
    stretch = model.stretch
    return _LOADING if stretch is None else stretch.card(model.source.name)


def base_licence(folder: Path) -> str | None:
    """Returns the licence that the base model's own card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8", errors="replace")
    if not head.startswith("---"):
        return None
    found = _LICENCE.search(head.split("\n---", 1)[0])
    return None if found is None else found.group(1)


def _settings(config: TrainConfig, *, is_adapter: bool) -> dict[str, Any]:
    optimizer, lora = config.optimizer, config.lora
    shared = {
        "learning rate": optimizer.learning_rate,
        "optimiser": optimizer.optim,
        "sequence length": config.data.max_length,
        "seed": config.seed,
    }
    packed = wanted_format(config.quant, config.dtype)
    held = "none" if packed is None else packed.code
    adapter = {"rank": lora.lora_r, "alpha": lora.lora_alpha, "quantisation": held}
    return {**(adapter if is_adapter else {}), **shared}


def _front_matter(model: LanguageModel, *, is_adapter: bool) -> str:
    # JSON strings are YAML strings: no name can add lines to the front matter.
    values = {
        "base_model": model.source.name,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastjax", *(["lora"] if is_adapter else [])],
    }
    licence = base_licence(model.source.folder)
    values |= {"license": licence} if licence else {}
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("train_loss", "eval_loss", "eval_perplexity", "train_runtime")
    return [(n, f"{metrics[n]:.4g}") for n in names if metrics.get(n) is not None]


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    heading = [f"## {title}", ""] if title else []
    return "\n".join([*heading, "| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    """Returns text that can end neither a table cell nor the line, and holds no tag."""
    return printable(value).replace("|", "/").replace("<", "&lt;").replace("`", "'")
