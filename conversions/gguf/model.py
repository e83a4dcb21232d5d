"""A whole model as one GGUF file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Array

from conversions.gguf.architectures import (
    architecture_of,
    gguf_name,
    heads_to_reorder,
    model_metadata,
    reordered_rows,
    rope_tensors,
)
from conversions.gguf.encodings import ENCODINGS, GGUFType, require_encoder
from conversions.gguf.file import ALIGNMENT, GGUFTensor, Value, gguf_writer
from conversions.gguf.tokenizer import (
    read_tokenizer,
    require_same_blanks,
    tokenizer_metadata,
)
from fastjax.errors import ModelError
from fastjax.files import require_space
from fastjax.models.build import DecoderSpec, abstract_decoder, weight_places
from fastjax.models.transformer_config import TransformerConfig

_QUANTIZATION_VERSION = 2
_SMALLEST_FOR_TABLES = "q8_0"


def write_gguf(
    path: Path,
    weights: Iterable[tuple[str, Array | np.ndarray]],
    config: TransformerConfig,
    *,
    source: Path,
    name: str,
    encoding: GGUFType = "f16",
) -> None:
    """Writes a model for llama.cpp and what builds on it.

    Each weight goes to its place as it comes, in any order; one is in host memory at a
    time. Vectors are float32. Rows that are no whole number of blocks are float16, and
    embeddings and head have at least 8 bits.

    Args:
      path: New file; an older one is replaced.
      weights: Our names and dense arrays, every one of the model exactly once.
      config: What the model is.
      source: Folder of its tokenizer.
      name: Name of the model inside the file.
      encoding: Of the matrices.

    Raises:
      ModelError: llama.cpp does not have this model or tokenizer.
      EnvironmentFault: The encoding needs a package that is not installed.
      StorageError: The disk is full.
    """
    require_encoder(encoding)
    shapes = _weight_shapes(config)
    extra = rope_tensors(config)
    tensors = {
        gguf_name(weight, config): GGUFTensor(shape, _encoding(weight, shape, encoding))
        for weight, shape in shapes.items()
    } | {key: GGUFTensor(array.shape, "f32") for key, array in extra.items()}
    metadata = _metadata(config, source, name=name, encoding=encoding)
    require_space(path, sum(t.nbytes + ALIGNMENT for t in tensors.values()))
    with gguf_writer(path, metadata, tensors) as put:
        for key, array in extra.items():
            put(key, array)
        for weight, array in weights:
            if weight not in shapes:
                raise ValueError(f"{weight} is no weight of {config.family} models")
            put(gguf_name(weight, config), _rows(weight, array, config))


def _metadata(
    config: TransformerConfig, source: Path, *, name: str, encoding: str
) -> dict[str, Value]:
    files = read_tokenizer(source)
    require_same_blanks(files, name)
    tokenizer = tokenizer_metadata(files, config.vocab_size)
    return {
        "general.architecture": architecture_of(config).name,
        "general.type": "model",
        "general.name": name,
        **model_metadata(config),
        "general.file_type": np.uint32(ENCODINGS[encoding].file_type),
        "general.quantization_version": np.uint32(_QUANTIZATION_VERSION),
        **tokenizer,
    }


def _weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns our names and the shapes in the file: matrices as [out, in]."""
    spec = DecoderSpec(config=config)
    shapes: dict[str, tuple[int, ...]] = {}
    for names, variable in weight_places(abstract_decoder(spec), spec):
        shape = variable.get_value().shape
        is_layer = names[0].startswith("layers.")
        for name in names:
            shapes[name] = shape[1:][::-1] if is_layer else shape
    return shapes


def _encoding(weight: str, shape: tuple[int, ...], wanted: str) -> str:
    if len(shape) == 1:
        return "f32"
    is_table = not weight.startswith("layers.")
    if is_table and ENCODINGS[wanted].block_size > 1:
        wanted = _SMALLEST_FOR_TABLES
    return wanted if ENCODINGS[wanted].fits(shape[-1]) else "f16"


def _rows(
    weight: str, array: Array | np.ndarray, config: TransformerConfig
) -> np.ndarray:
    """Returns a weight as llama.cpp wants it, as float32."""
    rows = np.asarray(array).astype(np.float32)
    if weight.startswith("layers.") and rows.ndim == 2:
        rows = rows.T
    if not np.isfinite(rows).all():
        raise ModelError("a weight is NaN or infinite", where=weight)
    if weight.endswith("norm.weight"):
        rows = rows + np.float32(config.norm_offset)
    heads = heads_to_reorder(weight, config)
    return rows if heads is None else reordered_rows(rows, heads)
