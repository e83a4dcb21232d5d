"""Folders for llama.cpp and Ollama: a GGUF file and a Modelfile."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Array

from conversions import gguf
from conversions.hf import read_config
from conversions.peft import stretch_of
from fastjax.api.finding import load_tokenizer
from fastjax.api.merging import Merge
from fastjax.config import GGUFKind
from fastjax.data import ChatTemplate
from fastjax.errors import ConfigError, DataError
from fastjax.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE, ADAPTER_FILE, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


def write_gguf_folder(
    folder: Path,
    merge: Merge,
    weights: Iterable[tuple[str, Array]],
    *,
    kind: GGUFKind,
    overwrite: bool,
) -> list[str]:
    """Writes model.gguf and a Modelfile; returns remarks for people.

    Args:
      folder: Made, whole or not at all.
      merge: What the model is.
      weights: Its dense weights.
      kind: Of the matrices. K-quants are made by `llama-quantize` from 16 bits.
      overwrite: Replace an existing folder.

    Raises:
      ModelError: llama.cpp does not have this model or tokenizer.
      EnvironmentFault: The kind needs a program or package that is not installed.
      StorageError: The folder exists, or the disk is full.
    """
    is_k_quant = kind in gguf.K_QUANTS
    if is_k_quant:
        gguf.require_llama_quantize()
    encoding = cast(gguf.GGUFType, "bf16" if is_k_quant else kind)
    config = merge.spec.config
    source = merge.tokenizer_folder or merge.folder
    with new_folder(folder, overwrite=overwrite) as new:
        written = new / (f"{encoding}.gguf" if is_k_quant else MODEL_FILE)
        gguf.write_gguf(
            written,
            weights,
            config,
            source=source,
            name=Path(merge.name).name,
            encoding=encoding,
        )
        if is_k_quant:
            gguf.requantise(written, new / MODEL_FILE, kind)
            written.unlink()
        format_name, remarks = _chat_format(merge)
        stops = gguf.stop_texts(
            gguf.read_tokenizer(merge.tokenizer_folder or merge.folder),
            config.eos_token_ids,
        )
        text = gguf.modelfile(f"./{MODEL_FILE}", format_name=format_name, stops=stops)
        (new / MODELFILE).write_text(text, encoding="utf-8")
    return [*gguf.differences(config), *remarks]


def write_gguf_adapter_folder(
    folder: Path, merge: Merge, *, overwrite: bool
) -> list[str]:
    """Writes adapter.gguf and a Modelfile; returns remarks for people.

    Raises:
      ConfigError: The adapter is right on its 4-bit base alone.
      ModelError: The adapter has parts that a GGUF adapter has no place for.
      StorageError: The folder exists, or the disk is full.
    """
    if merge.needs_4bit:
        raise ConfigError(
            "this adapter started from what 4 bits lose of the base (LoftQ); on the "
            "base of a GGUF file it would add that twice",
            fix="write the whole model: format=gguf with base_precision=dequantised",
        )
    with new_folder(folder, overwrite=overwrite) as new:
        path = new / ADAPTER_FILE
        spec = merge.spec
        gguf.write_gguf_lora(path, merge.adapter, spec.config, spec.adapters)
        text = gguf.modelfile(
            f"./{MODEL_FILE}",
            format_name=None,
            stops=(),
            adapter=f"./{ADAPTER_FILE}",
        )
        (new / MODELFILE).write_text(text, encoding="utf-8")
    return [
        f"the Modelfile expects the base model beside it, as {MODEL_FILE}: write it "
        f"with --model {merge.name} --format gguf",
        *_stretch(merge),
    ]


def _stretch(merge: Merge) -> list[str]:
    """Returns what llama.cpp must be told of the context of an adapter's base."""
    rope = merge.spec.config.rope
    if stretch_of(merge.spec.config, read_config(merge.folder)) is None:
        return []
    flags = f"--rope-scaling {rope.kind} --rope-scale {rope.factor:g}"
    if rope.kind == "yarn":
        flags += f" --yarn-orig-ctx {rope.original_max_position_embeddings}"
    return [f"the adapter was trained with a longer context: llama-cli {flags}"]


def _chat_format(merge: Merge) -> tuple[str | None, list[str]]:
    """Returns the known chat format of the tokenizer, or why there is none."""
    tokenizer = load_tokenizer(merge.folder)
    if tokenizer is None or not tokenizer.chat_template:
        return None, []
    try:
        found = gguf.matching_format(_renderer(tokenizer))
    except DataError:  # the template takes no such conversation
        found = None
    if found is not None:
        return found, []
    return None, [
        "the chat template is none of those that are known as a template of Ollama, so "
        f"the {MODELFILE} has none; llama.cpp reads the one in the GGUF file"
    ]


def _renderer(tokenizer: "PreTrainedTokenizerBase") -> Any:
    template = ChatTemplate(tokenizer)
    return lambda chat: template.render(chat, add_generation_prompt=True)
