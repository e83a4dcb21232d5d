"""Weights -> a model folder that other tools load: shards, index, config, tokenizer."""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from conversions.bnb import nf4_specs, padded_nf4_tensors, quantization_config
from conversions.hf.checkpoint import INDEX_NAME, WEIGHTS_NAME
from conversions.hf.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    read_config,
    stretched_keys,
)
from conversions.hf.families import checkpoint_tensors
from conversions.report import TensorReport
from conversions.rules import Layout, Tensor, relaid
from conversions.safetensors_header import TensorSpec
from conversions.safetensors_writer import PutTensor, safetensors_writer
from conversions.strict_json import read_json_object
from fastjax.config import DType
from fastjax.errors import ModelError
from fastjax.files import new_file, new_folder, require_space
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.linear import PackedFormat
from kernels.nf4 import NF4Array
from kernels.packed import PackedArray, dense

MAX_SHARD_BYTES = 5_000_000_000
# Names of weights; of those in one folder a reader takes the first.
WEIGHT_FILES = (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors")
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

type Shard = dict[str, TensorSpec]


def save_model(
    folder: Path,
    weights: Iterable[tuple[str, Array | np.ndarray | PackedArray]],
    config: TransformerConfig,
    *,
    source: Path,
    tokenizer_source: Path | None = None,
    dtype: DType = "bfloat16",
    packed: Mapping[str, PackedFormat] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a model folder that appears whole or not at all.

    Each weight goes to its place as it comes, in any order, so one is in host memory
    at a time. config.json of `source` names `dtype` and how weights are quantised;
    the other files are copied byte for byte.

    Args:
      folder: New model folder.
      weights: Our names and arrays, every one of the model exactly once.
      config: Says which tensors there must be.
      source: Folder of the base model: its config.json and tokenizer.
      tokenizer_source: Folder of another tokenizer.
      dtype: Of all dense tensors in the files.
      packed: 4-bit format of the linears that come as `NF4Array`, by our names of
        modules; they are written as bitsandbytes does.
      max_shard_bytes: Tensors of one file; several files get an index.
      overwrite: Replaces an existing folder.

    Raises:
      CheckpointMismatch: `weights` are not those of the model.
      StorageError: `folder` exists, or the disk is full.
    """
    packed = packed or {}
    tensors = checkpoint_tensors(config)
    shards = _planned(tensors, dtype, packed, max_shard_bytes)
    require_space(folder, sum(spec.nbytes for s in shards for spec in s.values()))
    with new_folder(folder, overwrite=overwrite) as new:
        copy_companions(source, new)
        if tokenizer_source is not None:
            copy_companions(tokenizer_source, new)
        changes: dict[str, Any] = {"vocab_size": config.vocab_size}
        changes |= stretched_keys(config, read_config(source))
        if (quantisation := _quantisation(tensors, packed)) is not None:
            changes["quantization_config"] = quantisation
        _write_config(source, new, dtype, changes)
        _write_tensors(new, shards, tensors, weights)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies generation defaults and tokenizer of a model folder byte for byte."""
    for pattern in COMPANION_FILES:
        for path in sorted(source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _quantisation(
    tensors: Sequence[Tensor], packed: Mapping[str, PackedFormat]
) -> dict[str, Any] | None:
    """Returns how config.json tells of the 4-bit weights, if there are any."""
    if not packed:
        return None
    formats = set(packed.values())
    if len(formats) > 1:
        raise ModelError(f"one checkpoint cannot hold several 4-bit formats: {formats}")
    linears = {t.name: t.hf for t in tensors if t.is_linear}
    dense = [hf for name, hf in linears.items() if _module(name) not in packed]
    return quantization_config(formats.pop(), [_module(hf) for hf in dense])


def _write_config(
    source: Path, folder: Path, dtype: DType, changes: Mapping[str, Any]
) -> None:
    """Copies config.json, changed only where the new weights need it."""
    path = source / CONFIG_NAME
    values = read_json_object(path, limit_bytes=MAX_CONFIG_BYTES)
    changed = dict(values)
    changed.pop("quantization_config", None)
    changed |= changes
    present = [key for key in ("dtype", "torch_dtype") if key in changed]
    # Both versions of transformers read the old key; neither key means float32.
    changed |= dict.fromkeys(present or ["torch_dtype"], dtype)
    if changed == values or (not present and changed == values | _FLOAT32):
        shutil.copyfile(path, folder / CONFIG_NAME)
        return
    with new_file(folder / CONFIG_NAME) as file:
        text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8"))


_FLOAT32 = {"torch_dtype": "float32"}


def _planned(
    tensors: Sequence[Tensor],
    dtype: DType,
    packed: Mapping[str, PackedFormat],
    max_shard_bytes: int,
) -> list[Shard]:
    """Returns the tensors of each shard, filled in the order of the model."""
    shards: list[Shard] = [{}]
    filled = 0
    for tensor in tensors:
        held = packed.get(_module(tensor.name)) if tensor.is_linear else None
        if held is None:
            specs = {tensor.hf: TensorSpec(np.dtype(dtype), tensor.shape)}
        else:
            specs = nf4_specs(tensor.hf, tensor.shape, held)
        size = sum(spec.nbytes for spec in specs.values())
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1].update(specs)
        filled += size
    return shards


def _write_tensors(
    folder: Path,
    shards: Sequence[Shard],
    tensors: Sequence[Tensor],
    weights: Iterable[tuple[str, Array | np.ndarray | PackedArray]],
) -> None:
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        _write_index(folder / INDEX_NAME, names, shards, parameters)
    by_name = {tensor.name: tensor for tensor in tensors}
    with contextlib.ExitStack() as stack:
        put_into: dict[str, PutTensor] = {}
        specs: Shard = {}
        for name, shard in zip(names, shards, strict=True):
            put = stack.enter_context(safetensors_writer(folder / name, shard))
            put_into.update(dict.fromkeys(shard, put))
            specs.update(shard)
        for name, array in weights:
            if name not in by_name:
                TensorReport(unexpected=(name,)).check(where=str(folder))
            for key, host in _stored(by_name.pop(name), array, specs).items():
                put_into[key](key, host)
        TensorReport(missing=tuple(by_name)).check(where=str(folder))


def _stored(
    tensor: Tensor,
    array: Array | np.ndarray | PackedArray,
    specs: Mapping[str, TensorSpec],
) -> dict[str, np.ndarray]:
    """Returns a weight as the file holds it; a device casts and transposes its own."""
    if isinstance(array, NF4Array):
        return padded_nf4_tensors(tensor.hf, array, specs)
    dtype = specs[tensor.hf].dtype
    array = dense(array) if isinstance(array, PackedArray) else array
    if isinstance(array, jax.Array):
        array = np.asarray(_laid_out(array, dtype=dtype.name, layout=tensor.layout))
        return {tensor.hf: array}
    host = np.asarray(array).astype(dtype, copy=False)
    return {tensor.hf: relaid(host, tensor.layout)}


@functools.partial(jax.jit, static_argnames=("dtype", "layout"))
def _laid_out(array: Array, *, dtype: str, layout: Layout) -> Array:
    return relaid(array.astype(dtype), layout)


def _write_index(
    path: Path, names: Sequence[str], shards: Sequence[Shard], parameters: int
) -> None:
    specs = [spec for shard in shards for spec in shard.values()]
    weight_map = {
        tensor: name
        for name, shard in zip(names, shards, strict=True)
        for tensor in shard
    }
    index: dict[str, Any] = {
        "metadata": {
            "total_parameters": parameters,
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    with new_file(path) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode("utf-8"))


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
