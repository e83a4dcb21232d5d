"""PEFT adapter folder -> weights; what PEFT only warns about is an error here."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from conversions.hf.families import checkpoint_tensors
from conversions.peft.adapter_config import AdapterConfig, read_adapter_config
from conversions.peft.names import (
    TABLES,
    is_of_table,
    peft_key,
    plain_key,
    second_end_keys,
)
from conversions.peft.stretch import stretched_config
from conversions.report import TensorReport, compare_shapes
from conversions.rules import Tensor, relaid
from conversions.safetensors_file import SafetensorsFile
from fastjax.config import LoRAConfig
from fastjax.errors import ModelError, printable
from fastjax.models.transformer_config import TransformerConfig
from fastjax.target_modules import full_name, own_name

ADAPTER_NAME = "adapter_model.safetensors"

_WHOLE_TABLES = [peft_key(f"{table}.weight", set())[0] for table in TABLES]
_FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A trained adapter.

    Attributes:
      lora: Its kind; target modules match exactly the adapted ones.
      weights: Float32 arrays by our names; tables under adapters as they are stored.
      base_model_name_or_path: Folder or hub name of the base model, if recorded.
      revision: Of the base model, if recorded.
      config: Of the base as training changed it: more tokens, a longer context.
    """

    lora: LoRAConfig
    config: TransformerConfig
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
    config = grown_config(folder, config)
    base = checkpoint_tensors(config)
    lora, modules = _resolved(recorded, base, config)
    adapted = set(map(own_name, modules))
    recorded.check_tables(adapted, is_tied=config.tie_word_embeddings)
    file = SafetensorsFile(_weights_path(folder))
    keys = _keys(file)
    if config.tie_word_embeddings:
        _drop_second_end(file, keys, adapted)
    # PEFT may have been told to leave the weights under adapted tables out.
    expected = [
        tensor
        for tensor in _expected(base, adapted, lora)
        if tensor.hf in keys or not _is_under_adapter(tensor.name, adapted)
    ]
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
        config=config,
        weights={
            t.name: _read(
                file, keys[t.hf], t, keeps_dtype=_is_under_adapter(t.name, adapted)
            )
            for t in expected
        },
        base_model_name_or_path=recorded.base_model_name_or_path,
        revision=recorded.revision,
    )


def read_lora(folder: Path, config: TransformerConfig) -> LoRAConfig:
    """Returns the kind of an adapter for a base of these sizes; reads no weight.

    Raises:
      ModelError: The file is missing or broken, or fits no module of the base.
    """
    recorded = read_adapter_config(folder)
    return _resolved(recorded, checkpoint_tensors(config), config)[0]


def grown_config(folder: Path, config: TransformerConfig) -> TransformerConfig:
    """Returns the base's sizes as the training of an adapter changed them.

    That is with as many tokens as there are trained rows, and a stretched context.

    Raises:
      ModelError: The weights of the adapter cannot be read.
    """
    file = SafetensorsFile(_weights_path(folder))
    config = stretched_config(file, config)
    shapes = [s.shape for key, s in file.tensors.items() if key in _WHOLE_TABLES]
    rows = {shape[0] for shape in shapes if shape[1:] == (config.hidden_size,)}
    if len(rows) != 1 or max(rows) <= config.vocab_size:
        return config
    return dataclasses.replace(config, vocab_size=rows.pop())


def _resolved(
    recorded: AdapterConfig, base: tuple[Tensor, ...], config: TransformerConfig
) -> tuple[LoRAConfig, tuple[str, ...]]:
    names = [full_name(_module(tensor)) for tensor in base if tensor.is_linear]
    return recorded.resolved(names, is_tied=config.tie_word_embeddings)


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
            if lora.lora_b_bias:
                shapes[f"{module}.lora_b_bias"] = (outputs,)
            if lora.use_dora:
                shapes[f"{module}.lora_magnitude"] = (outputs,)
        is_trained = lora.lora_bias == "all" or module in adapted
        if tensor.name.endswith(".bias") and lora.lora_bias != "none" and is_trained:
            shapes[tensor.name] = tensor.shape
        if tensor.name == "embed_tokens.weight" and lora.trainable_token_indices:
            count = len(lora.trainable_token_indices)
            shapes["embed_tokens.rows"] = (count, tensor.shape[1])
        if not is_of_table(tensor.name):
            continue
        if module in adapted:
            rows, features = tensor.shape
            rank = lora.rank(full_name(module))
            is_head = module == "lm_head"
            inputs, outputs = (features, rows) if is_head else (rows, features)
            shapes[f"{module}.lora_a"] = (rank, inputs)
            shapes[f"{module}.lora_b"] = (outputs, rank)
            shapes[tensor.name] = tensor.shape
        elif _is_trained(module, base, lora):
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


def _drop_second_end(
    file: SafetensorsFile, keys: dict[str, str], adapted: set[str]
) -> None:
    """Leaves out the output head of tied embeddings, which PEFT stores twice."""
    for second, (first, is_turned) in second_end_keys(adapted).items():
        if second not in keys:
            continue
        if first not in keys and not is_turned:
            keys[first] = keys.pop(second)
            continue
        head = file.read(keys.pop(second))
        same = file.read(keys[first]) if first in keys else None
        if same is None or not np.array_equal(head.T if is_turned else head, same):
            raise ModelError(
                "embeddings and output head are one table, but differ here",
                where=f"{file.path}, {second}",
            )


def _is_under_adapter(name: str, adapted: set[str]) -> bool:
    """Says whether a weight is a table's with an adapter on it."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module in adapted


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


def _read(
    file: SafetensorsFile, key: str, tensor: Tensor, *, keeps_dtype: bool
) -> Array:
    host = file.read(key)
    host = host if keeps_dtype else host.astype(np.float32)
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
