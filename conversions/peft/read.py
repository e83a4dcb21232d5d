"""PEFT adapter folder -> weights; what PEFT only warns about is an error here."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from conversions.hf.families import checkpoint_tensors
from conversions.peft.adapter_config import read_adapter_config
from conversions.peft.names import (
    TABLES,
    full_name,
    is_of_table,
    own_name,
    peft_key,
    plain_key,
)
from conversions.report import TensorReport, compare_shapes
from conversions.rules import Tensor, relaid
from conversions.safetensors_file import SafetensorsFile
from fastjax.config import LoRAConfig
from fastjax.errors import ModelError, printable
from fastjax.models.transformer_config import TransformerConfig

ADAPTER_NAME = "adapter_model.safetensors"

_FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A trained adapter.

    Attributes:
      lora: Its kind; target modules match exactly the adapted ones.
      weights: Float32 arrays by our names.
      base_model_name_or_path: Folder or hub name of the base model, if recorded.
      revision: Of the base model, if recorded.
    """

    lora: LoRAConfig
    weights: dict[str, Array]
    base_model_name_or_path: str | None
    revision: str | None


def read_adapter(folder: Path, config: TransformerConfig) -> Adapter:
    """Returns the adapter of a folder for a base model.

    Raises:
      CheckpointMismatch: Names every missing, unexpected or misshapen tensor.
      ModelError: A file is missing or broken, values are not finite, or the adapter
        needs what is not supported.
    """
    recorded = read_adapter_config(folder)
    base = checkpoint_tensors(config)
    names = [full_name(_module(tensor)) for tensor in base if tensor.is_linear]
    lora, modules = recorded.resolved(names)
    recorded.check_tables(is_tied=config.tie_word_embeddings)
    expected = _expected(base, {own_name(name) for name in modules}, lora)
    file = SafetensorsFile(_weights_path(folder))
    keys = _keys(file)
    if config.tie_word_embeddings and lora.modules_to_save:
        _drop_second_end(file, keys)
    found = {plain: file.tensors[key].shape for plain, key in keys.items()}
    report = compare_shapes({t.hf: t.shape for t in expected}, found)
    wrong_dtypes = {
        plain: f"{file.tensors[key].dtype} is no dtype of an adapter"
        for plain, key in keys.items()
        if file.tensors[key].dtype.name not in _FLOATS
    }
    misshapen = {**report.misshapen, **wrong_dtypes}
    TensorReport(report.missing, report.unexpected, misshapen).check(
        where=str(file.path),
        fix=f"adapter_config.json says r={lora.lora_r} and which modules are adapted; "
        "both files and the base model must belong together",
    )
    return Adapter(
        lora=lora,
        weights={t.name: _read(file, keys[t.hf], t) for t in expected},
        base_model_name_or_path=recorded.base_model_name_or_path,
        revision=recorded.revision,
    )


def _expected(
    base: tuple[Tensor, ...], adapted: set[str], lora: LoRAConfig
) -> list[Tensor]:
    """Returns the tensors that the file must hold, by PEFT's keys."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in base:
        module = _module(tensor)
        if tensor.is_linear and module in adapted:
            outputs, inputs = tensor.shape
            rank = lora.rank(full_name(module))
            shapes[f"{module}.lora_a"] = (rank, inputs)
            shapes[f"{module}.lora_b"] = (outputs, rank)
            if lora.use_dora:
                shapes[f"{module}.lora_magnitude"] = (outputs,)
        is_trained = lora.lora_bias == "all" or module in adapted
        if tensor.name.endswith(".bias") and lora.lora_bias != "none" and is_trained:
            shapes[tensor.name] = tensor.shape
        if tensor.name == "embed_tokens.weight" and lora.trainable_token_indices:
            count = len(lora.trainable_token_indices)
            shapes["embed_tokens.rows"] = (count, tensor.shape[1])
        if is_of_table(tensor.name) and _is_trained(module, base, lora):
            shapes[tensor.name] = tensor.shape
    tensors = []
    for name, shape in shapes.items():
        key, layout = peft_key(name, adapted)
        tensors.append(Tensor(key, name, shape, layout))
    return tensors


def _is_trained(table: str, base: tuple[Tensor, ...], lora: LoRAConfig) -> bool:
    """Says whether a table trains; where one is both ends, either name means it."""
    ends = [_module(tensor) for tensor in base if is_of_table(tensor.name)]
    return bool(lora.modules_to_save) and (
        table in lora.modules_to_save or ends == [table]
    )


def _drop_second_end(file: SafetensorsFile, keys: dict[str, str]) -> None:
    """Leaves out the output head of tied embeddings, which PEFT stores twice."""
    first, second = (peft_key(f"{table}.weight", set())[0] for table in TABLES)
    if second not in keys:
        return
    if first not in keys:
        keys[first] = keys.pop(second)
        return
    head = file.read(keys.pop(second))
    if not np.array_equal(head, file.read(keys[first])):
        raise ModelError(
            "embeddings and output head are one table, but differ here",
            where=str(file.path),
        )


def _module(tensor: Tensor) -> str:
    return tensor.name.rpartition(".")[0]


def _keys(file: SafetensorsFile) -> dict[str, str]:
    """Returns the keys of the file by what they mean."""
    keys: dict[str, str] = {}
    for key in file.tensors:
        plain = plain_key(key)
        if plain in keys:
            raise ModelError(
                f"{printable(key)} and {printable(keys[plain])} are the same tensor",
                where=str(file.path),
            )
        keys[plain] = key
    return keys


def _read(file: SafetensorsFile, key: str, tensor: Tensor) -> Array:
    host = file.read(key).astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(host))
    if bad:
        raise ModelError(
            f"{bad} of {host.size} values are NaN or infinite",
            where=f"{file.path}, {printable(key)}",
            fix="the adapter is damaged, or its training diverged",
        )
    return jax.device_put(relaid(host, tensor.layout), may_alias=False)


def _weights_path(folder: Path) -> Path:
    path = folder / ADAPTER_NAME
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise ModelError(
            "the adapter is a pickle (adapter_model.bin); loading it could run code",
            where=str(folder),
            fix="load and save it once with PEFT in an isolated environment",
        )
    raise ModelError(f"{ADAPTER_NAME} is missing", where=str(folder))
