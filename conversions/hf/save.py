"""Weights -> a model folder that other tools load: shards, index, config, tokenizer."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from conversions.atomic import new_file, new_folder
from conversions.hf.checkpoint import INDEX_NAME, WEIGHTS_NAME
from conversions.hf.config import CONFIG_NAME, MAX_CONFIG_BYTES
from conversions.hf.families import checkpoint_tensors
from conversions.report import TensorReport
from conversions.rules import Layout, Tensor, relaid
from conversions.safetensors_header import TensorSpec
from conversions.safetensors_writer import PutTensor, safetensors_writer
from conversions.strict_json import read_json_object
from fastjax.config import DType
from fastjax.errors import ModelError, StorageError
from fastjax.models.transformer_config import TransformerConfig
from kernels.nf4 import NF4Array

MAX_SHARD_BYTES = 5_000_000_000
COPIED = (
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

_SPARE_BYTES = 64_000_000


def save_model(
    folder: Path,
    weights: Iterable[tuple[str, Array | np.ndarray]],
    config: TransformerConfig,
    *,
    source: Path,
    dtype: DType = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a model folder that appears whole or not at all.

    Each weight goes to its place as it comes, in any order, so one is in host memory
    at a time. config.json of `source` loses `quantization_config` and names `dtype`;
    the other files are copied byte for byte.

    Args:
      folder: New model folder.
      weights: Our names and dense arrays, every one of the model exactly once.
      config: Says which tensors there must be.
      source: Folder of the base model: its config.json and tokenizer.
      dtype: Of all tensors in the files.
      max_shard_bytes: Tensors of one file; several files get an index.
      overwrite: Replaces an existing folder.

    Raises:
      CheckpointMismatch: `weights` are not those of the model.
      StorageError: `folder` exists, or the disk is full.
    """
    tensors = checkpoint_tensors(config)
    shards = _planned(tensors, dtype, max_shard_bytes)
    with new_folder(folder, overwrite=overwrite) as new:
        _check_space(new, sum(spec.nbytes for s in shards for spec in s.values()))
        copy_companions(source, new)
        _write_config(source, new, dtype)
        _write_tensors(new, shards, tensors, weights)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies generation defaults and tokenizer of a model folder byte for byte."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write_config(source: Path, folder: Path, dtype: DType) -> None:
    """Copies config.json, changed only where the new weights need it."""
    path = source / CONFIG_NAME
    values = read_json_object(path, limit_bytes=MAX_CONFIG_BYTES)
    changed = dict(values)
    changed.pop("quantization_config", None)
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
    tensors: Sequence[Tensor], dtype: DType, max_shard_bytes: int
) -> list[dict[str, TensorSpec]]:
    """Returns the tensors of each shard, filled in the order of the model."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for tensor in tensors:
        spec = TensorSpec(np.dtype(dtype), tensor.shape)
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][tensor.hf] = spec
        filled += spec.nbytes
    return shards


def _write_tensors(
    folder: Path,
    shards: Sequence[dict[str, TensorSpec]],
    tensors: Sequence[Tensor],
    weights: Iterable[tuple[str, Array | np.ndarray]],
) -> None:
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        _write_index(folder / INDEX_NAME, names, shards)
    by_name = {tensor.name: tensor for tensor in tensors}
    with contextlib.ExitStack() as stack:
        put_into: dict[str, PutTensor] = {}
        specs: dict[str, TensorSpec] = {}
        for name, shard in zip(names, shards, strict=True):
            put = stack.enter_context(safetensors_writer(folder / name, shard))
            put_into.update(dict.fromkeys(shard, put))
            specs.update(shard)
        for name, array in weights:
            if name not in by_name:
                TensorReport(unexpected=(name,)).check(where=str(folder))
            tensor = by_name.pop(name)
            host = _host(name, array, specs[tensor.hf].dtype, tensor.layout)
            put_into[tensor.hf](tensor.hf, host)
        TensorReport(missing=tuple(by_name)).check(where=str(folder))


def _host(
    name: str, array: Array | np.ndarray, dtype: np.dtype, layout: Layout
) -> np.ndarray:
    """Returns the array as the file holds it; a device casts and transposes its own."""
    if isinstance(array, NF4Array):
        raise ModelError(f"{name} is quantised; dequantise it before saving")
    if isinstance(array, jax.Array):
        return np.asarray(_laid_out(array, dtype=dtype.name, layout=layout))
    return relaid(np.asarray(array).astype(dtype, copy=False), layout)


@functools.partial(jax.jit, static_argnames=("dtype", "layout"))
def _laid_out(array: Array, *, dtype: str, layout: Layout) -> Array:
    return relaid(array.astype(dtype), layout)


def _write_index(
    path: Path, names: Sequence[str], shards: Sequence[dict[str, TensorSpec]]
) -> None:
    specs = [spec for shard in shards for spec in shard.values()]
    weight_map = {
        tensor: name
        for name, shard in zip(names, shards, strict=True)
        for tensor in shard
    }
    index: dict[str, Any] = {
        "metadata": {
            "total_parameters": sum(s.nbytes // s.dtype.itemsize for s in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    with new_file(path) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode("utf-8"))


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise StorageError(
            f"the disk is too full: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free",
            where=str(folder.parent),
            fix="free some space, or choose another folder",
        )
