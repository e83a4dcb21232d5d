"""New tokens: a longer tokenizer, and rows for it in embeddings and output head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from conversions.hf import read_config
from fastjax.api.language_model import LanguageModel
from fastjax.api.tokenizer import Tokenizer
from fastjax.config import LoRAConfig
from fastjax.errors import ConfigError, ModelError


def add_new_tokens(
    model: LanguageModel, tokenizer: Any, new_tokens: Sequence[str]
) -> int:
    """Gives the tokenizer new tokens and the model rows for them; returns how many.

    A new row starts as the mean of all rows that the model came with. Tokens that the
    tokenizer has already are left out.

    Args:
      model: Without adapters.
      tokenizer: Of the model; changed in place.
      new_tokens: Texts that become one token each.

    Raises:
      ConfigError: The model has adapters already.
      ModelError: The model has no tokenizer.
    """
    plain = tokenizer.wrapped if isinstance(tokenizer, Tokenizer) else tokenizer
    if plain is None:
        raise ModelError("the model has no tokenizer to give new tokens to")
    before = len(plain)
    count = plain.add_tokens(list(new_tokens))
    if count:
        model.tokenizer = plain
        _grow(model, max(len(plain), model.config.vocab_size), first_new=before)
    return count


def resize_token_embeddings(model: LanguageModel, size: int) -> None:
    """Gives embeddings and output head `size` rows; new ones are the mean of the old.

    Raises:
      ConfigError: The model has adapters already, or `size` leaves rows out.
    """
    _grow(model, size, first_new=model.config.vocab_size)


def require_trained_rows(model: LanguageModel, lora: LoRAConfig) -> None:
    """Checks that adapters hold the rows that the base's files do not have.

    Raises:
      ConfigError: modules_to_save leaves an end out.
    """
    grew = model.config.vocab_size > read_config(model.source.folder).vocab_size
    if not model.has_new_tokens or (lora.trainable_token_indices and not grew):
        return
    needed = ["embed_tokens"]
    needed += [] if model.config.tie_word_embeddings else ["lm_head"]
    missing = [name for name in needed if name not in lora.modules_to_save]
    if missing:
        raise ConfigError(
            f"there are new tokens, but {' and '.join(missing)} would not be saved "
            "with the adapter",
            fix=f"set modules_to_save to {' '.join(needed)}",
        )


def _grow(model: LanguageModel, size: int, *, first_new: int) -> None:
    held = model.config.vocab_size
    if size < held:
        raise ConfigError(
            f"{size} rows for a vocabulary of {held}: rows are not taken away"
        )
    if model.spec.adapters:
        raise ConfigError(
            "the model has adapters already",
            fix="add tokens first, then call get_peft_model",
        )
    tables = (model.decoder.embed_tokens, model.decoder.lm_head)
    for table in (table for table in tables if table is not None):
        table.weight.set_value(_grown(table.weight.get_value(), size, first_new))
    config = dataclasses.replace(model.config, vocab_size=size)
    model.spec = dataclasses.replace(model.spec, config=config)
    model.has_new_tokens = True


def _grown(table: Float[Array, "V D"], size: int, first_new: int) -> Array:
    """Returns the table with `size` rows, those from `first_new` on their mean."""
    old = table[:first_new].astype(jnp.float32)
    mean = jnp.mean(old, axis=0).astype(table.dtype)
    new = jnp.broadcast_to(mean, (size - len(old), table.shape[1]))
    return jnp.concatenate([table[: len(old)], new])
