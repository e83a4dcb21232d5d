"""What a folder holds, and what of it is missing or wrong."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from conversions.hf import (
    Checkpoint,
    check_tensors,
    read_config,
    stored_formats,
    stream_weights,
)
from conversions.peft import AdapterConfig, read_adapter, read_adapter_config
from fastjax import runtime
from fastjax.api.finding import find_model, load_tokenizer
from fastjax.api.gguf_inspection import gguf_facts
from fastjax.api.serving import serving_notes
from fastjax.config import LoRAConfig
from fastjax.errors import FastJaxError, ModelError
from fastjax.models.build import linear_names
from fastjax.models.transformer_config import TransformerConfig

_GIB = 2**30
_EXTRAS = (
    *("rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("modules_to_save", "trainable_token_indices"),
)
_ADAPTER_CONFIG, _MODEL_CONFIG = "adapter_config.json", "config.json"
_GGUF = ".gguf"
_EIGHT_BIT = {"int8": "LLM.int8", "float8_e4m3fn": "FP8, in blocks"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What a folder holds.

    Attributes:
      facts: What is so, name and value.
      remarks: What other programs will make of it.
      problems: What is missing or wrong.
    """

    facts: dict[str, str]
    remarks: tuple[str, ...] = ()
    problems: tuple[FastJaxError, ...] = ()


class _Findings:
    """Facts, and the errors of what could not be found out."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.problems: list[FastJaxError] = []

    def attempt[T](self, read: Callable[[], T]) -> T | None:
        """Returns what `read` returns, or None and notes why it cannot."""
        try:
            return read()
        except FastJaxError as error:
            self.problems.append(error)
            return None


def inspect_folder(folder: Path, *, reads_values: bool = False) -> Inspection:
    """Returns what a model or adapter folder holds; goes on past what is wrong.

    Args:
      folder: With config.json, adapter_config.json or GGUF files; or one of these.
      reads_values: Read every weight of a model, to find NaN, infinite values and
        broken 4-bit data; adapters are always read.

    Raises:
      ModelError: There is no such folder, or it holds neither.
    """
    runtime.configure()
    found = _Findings()
    remarks: tuple[str, ...] = ()
    if folder.suffix == _GGUF and folder.is_file():
        _inspect_gguf(found, folder)
    elif not folder.is_dir():
        raise ModelError(
            "this is a file" if folder.is_file() else "there is no such folder",
            where=str(folder),
            fix="give the folder of a model or an adapter, which holds its config",
        )
    elif (folder / _ADAPTER_CONFIG).is_file():
        recorded = found.attempt(lambda: read_adapter_config(folder))
        if recorded is not None:
            _inspect_adapter(found, folder, recorded)
            remarks = tuple(serving_notes(recorded.lora))
        _inspect_tokenizer(found, folder)
    elif (folder / _MODEL_CONFIG).is_file():
        config = found.attempt(lambda: read_config(folder))
        if config is not None:
            found.facts |= dict(_sizes(config))
        _inspect_weights(found, folder, config, reads_values=reads_values)
        _inspect_tokenizer(found, folder)
    elif files := sorted(folder.glob(f"*{_GGUF}")):
        for file in files:
            _inspect_gguf(found, file, f"{file.name} " if len(files) > 1 else "")
    else:
        raise ModelError(
            f"neither {_MODEL_CONFIG} nor {_ADAPTER_CONFIG} nor a GGUF file is here",
            where=str(folder),
            fix="give the folder of a model or of an adapter",
        )
    return Inspection(
        facts=found.facts, remarks=remarks, problems=tuple(found.problems)
    )


def _inspect_gguf(found: _Findings, path: Path, prefix: str = "") -> None:
    facts = found.attempt(lambda: dict(gguf_facts(path))) or {}
    found.facts |= {prefix + name: value for name, value in facts.items()}


def _inspect_adapter(found: _Findings, folder: Path, recorded: AdapterConfig) -> None:
    found.facts["adapter"] = _kind(recorded.lora)
    found.facts["base"] = recorded.base_model_name_or_path or "not recorded"
    base = found.attempt(lambda: find_model(str(folder), with_weights=False))
    if base is None:
        return
    config = found.attempt(lambda: read_config(base.folder))
    if config is None:
        return
    adapter = found.attempt(lambda: read_adapter(folder, config))
    found.facts |= dict(_sizes(config if adapter is None else adapter.config))
    if adapter is not None:
        count = sum(array.size for array in adapter.weights.values())
        modules = sum(name.endswith(".lora_a") for name in adapter.weights)
        found.facts["trained"] = f"{count:,} values, {modules} adapted modules"


def _inspect_weights(
    found: _Findings,
    folder: Path,
    config: TransformerConfig | None,
    *,
    reads_values: bool,
) -> None:
    checkpoint = found.attempt(lambda: Checkpoint(folder))
    if checkpoint is None:
        return
    held: collections.Counter[str] = collections.Counter()
    for spec in checkpoint.tensors.values():
        held[spec.dtype.name] += spec.nbytes
    parts = ", ".join(f"{size / _GIB:.2f} GiB {kind}" for kind, size in held.items())
    files = len(checkpoint.weight_files)
    found.facts["weights"] = (
        f"{len(checkpoint.tensors)} tensors in {files} file{'s'[: files > 1]}: {parts}"
    )
    if config is None:
        return
    if found.attempt(lambda: check_tensors(checkpoint, config)) is None:
        return
    formats = found.attempt(lambda: stored_formats(checkpoint, config))
    if formats:
        kinds = {
            f"{f.code}{', double quantised' if f.double_quant else ''}"
            for f in formats.values()
        }
        dense = len(linear_names(config)) - len(formats)
        found.facts["4-bit"] = (
            f"{len(formats)} linears in {' and '.join(sorted(kinds))}; {dense} in 16 "
            "bits"
        )
    eight_bit = collections.Counter(
        spec.dtype.name
        for name, spec in checkpoint.tensors.items()
        if name.endswith(".weight") and spec.dtype.name in _EIGHT_BIT
    )
    for kind, count in eight_bit.items():
        found.facts["8-bit"] = f"{count} linears in {_EIGHT_BIT[kind]}"
    if reads_values and found.attempt(lambda: _count_weights(checkpoint, config)):
        found.facts["values"] = "all finite"


def _count_weights(checkpoint: Checkpoint, config: TransformerConfig) -> int:
    return sum(1 for _ in stream_weights(checkpoint, config, dtype="float32"))


def _inspect_tokenizer(found: _Findings, folder: Path) -> None:
    tokenizer = found.attempt(lambda: load_tokenizer(folder))
    if tokenizer is None:
        found.facts["tokenizer"] = "none in this folder"
        return
    template = "with" if tokenizer.chat_template else "without"
    found.facts["tokenizer"] = f"{len(tokenizer):,} tokens, {template} chat template"


def _sizes(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key"
    tied = ", tied" if config.tie_word_embeddings else ""
    yield "family", config.family
    yield (
        "sizes",
        f"{config.num_hidden_layers} layers of {config.hidden_size:,}, "
        f"{heads} heads of {config.head_dim}, "
        f"{config.intermediate_size:,} in the feed-forward network",
    )
    yield "vocabulary", f"{config.vocab_size:,}{tied}"
    windows = {window for window in config.windows if window is not None}
    count = np.count_nonzero([window is not None for window in config.windows])
    yield (
        "context",
        f"{config.context_tokens:,} tokens, RoPE {config.rope.kind}"
        + (f", windows of {max(windows):,} in {count} layers" if windows else ""),
    )


def _kind(lora: LoRAConfig) -> str:
    names = {"rsLoRA": lora.use_rslora, "DoRA": lora.use_dora}
    kinds = [name for name, is_so in names.items() if is_so] or ["LoRA"]
    extras = [
        f"{field}={getattr(lora, field)}" for field in _EXTRAS if getattr(lora, field)
    ]
    bias = [] if lora.lora_bias == "none" else [f"biases {lora.lora_bias}"]
    bias += ["biases of up projections"] if lora.lora_b_bias else []
    return ", ".join(
        [
            f"{' and '.join(kinds)} of rank {lora.lora_r}, alpha {lora.lora_alpha:g}",
            *bias,
            *extras,
        ]
    )
