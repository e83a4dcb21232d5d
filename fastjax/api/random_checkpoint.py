"""Checkpoints of a preset's shapes with random weights, for demos and benchmarks."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from conversions.hf import save_model, write_config
from fastjax import runtime
from fastjax.config import DType
from fastjax.data import embedded_text, save_tiny_tokenizer
from fastjax.errors import StorageError
from fastjax.files import require_free_name
from fastjax.models.build import DecoderSpec, abstract_decoder, weight_places
from fastjax.models.registry import preset
from fastjax.models.transformer_config import TransformerConfig

_STANDARD_DEVIATION = 0.02


def make_random_checkpoint(
    sizes: str | TransformerConfig,
    folder: Path,
    *,
    dtype: DType = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint of a preset's shapes, with a small tokenizer.

    Weights are normal with standard deviation 0.02, those that write into the
    residual stream divided by sqrt(2 L) as in GPT-2; norms are one, biases zero.

    Args:
      sizes: Preset name, or any sizes.
      folder: Made.
      dtype: Of the weights.
      seed: Of the weights.
      overwrite: Replaces an existing folder.

    Raises:
      ConfigError: There is no such preset.
      StorageError: The folder exists, or the disk is full.
    """
    runtime.configure()
    require_free_name(folder, overwrite=overwrite)
    config = preset(sizes).config if isinstance(sizes, str) else sizes
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        write_config(source, config, dtype=dtype)
        save_tiny_tokenizer(source, texts=embedded_text())
        weights = random_weights(config, dtype=dtype, key=jax.random.key(seed))
        save_model(
            folder, weights, config, source=source, dtype=dtype, overwrite=overwrite
        )
    return folder


def random_checkpoint_of(name: str) -> Path:
    """Returns the cached random checkpoint of a preset that has no published one."""
    folder = runtime.cache_folder() / "random" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            make_random_checkpoint(name, folder)
        except StorageError:  # or another process has made it meanwhile
            if not folder.is_dir():
                raise
    return folder


def random_weights(
    config: TransformerConfig, *, dtype: DType, key: PRNGKeyArray
) -> Iterator[tuple[str, Array]]:
    """Yields (canonical name, array) of random weights, one at a time."""
    spec = DecoderSpec(config=config, param_dtype=dtype)
    for names, variable in weight_places(abstract_decoder(spec), spec):
        shape = variable.get_value().shape
        shape = shape[1:] if names[0].startswith("layers.") else shape
        for name in names:
            key, now = jax.random.split(key)
            yield name, _random(name, shape, jnp.dtype(dtype), now, config)


def _random(
    name: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    key: PRNGKeyArray,
    config: TransformerConfig,
) -> Array:
    if name.endswith("norm.weight"):
        return jnp.full(shape, 1 - config.norm_offset, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    deviation = _STANDARD_DEVIATION
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)
