"""Starts adapters from what 4 bits lose: the 16-bit weights are read once more."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from conversions.hf import Checkpoint, stored_formats, stream_weights
from fastjax.api.language_model import LanguageModel
from fastjax.errors import ConfigError
from fastjax.loftq import low_rank_start
from fastjax.lora import set_adapter_weights
from fastjax.models.build import flat_weights
from kernels.nf4 import NF4Array, dequantize
from kernels.packed import PackedArray


def start_from_loss(model: LanguageModel, *, seed: int) -> None:
    """Gives fresh adapters the nearest product to weight less 4-bit weight.

    Args:
      model: Has fresh adapters over 4-bit weights.
      seed: Of the random directions.

    Raises:
      ConfigError: There are no 4-bit weights, or no 16-bit ones to compare with.
    """
    checkpoint = Checkpoint(model.source.folder)
    if not model.spec.has_4bit or stored_formats(checkpoint, model.config):
        raise ConfigError(
            "init_lora_weights=loftq needs a 16-bit model that is loaded in 4 bits",
            fix="set load_in_4bit and give the model that is not quantised yet",
        )

    def is_wanted(name: str) -> bool:
        return name.removesuffix(".weight") in model.spec.adapters

    packed = dict(flat_weights(model.decoder, model.spec, wanted=is_wanted))
    found: dict[str, Array] = {}
    key = jax.random.key(seed)
    for name, weight in stream_weights(checkpoint, model.config, dtype="float32"):
        held = packed.pop(name, None)
        if not isinstance(held, NF4Array) or isinstance(weight, PackedArray):
            continue
        module = name.removesuffix(".weight")
        adapter = model.spec.adapters[module]
        lost = weight - dequantize(held).astype(jnp.float32)
        key, own = jax.random.split(key)
        down, up = low_rank_start(lost, own, rank=adapter.rank)
        found[f"{module}.lora_a"] = down
        found[f"{module}.lora_b"] = up / adapter.scaling
    set_adapter_weights(model.decoder, model.spec, found)
