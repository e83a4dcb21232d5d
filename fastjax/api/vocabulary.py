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
    first = min(len(plain), model.config.vocab_size)
    count = plain.add_tokens(list(new_tokens))
    if count:
        model.tokenizer = plain
        _renew(model, range(first, len(plain)))
    return count


def resize_token_embeddings(model: LanguageModel, size: int) -> None:
    """Gives embeddings and output head `size` rows; new ones are the mean of the old.

    Raises:
      ConfigError: The model has adapters already, or `size` leaves rows out.
    """
    held = model.config.vocab_size
    if size < held:
        raise ConfigError(
            f"{size} rows for a vocabulary of {held}: rows are not taken away"
        )
    if size > held:
        _renew(model, range(held, size))


def require_trained_rows(model: LanguageModel, lora: LoRAConfig) -> None:
    """Checks that adapters hold the rows that the base's files do not have.

    Rows by themselves are enough where the table did not grow and is the head too.

    Raises:
      ConfigError: modules_to_save leaves an end out, or trainable_token_indices a row.
    """
    grew = model.config.vocab_size > read_config(model.source.folder).vocab_size
    is_tied = model.config.tie_word_embeddings
    by_row = is_tied and not grew
    if by_row and model.new_rows.issubset(lora.trainable_token_indices):
        return
    needed = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    missing = [name for name in needed if name not in lora.modules_to_save]
    if model.new_rows and missing:
        rows = f", or trainable_token_indices to {_shown(model.new_rows)}"
        raise ConfigError(
            f"there are new tokens, but {' and '.join(missing)} would not be saved "
            "with the adapter",
            fix=f"set modules_to_save to {' '.join(needed)}{rows if by_row else ''}",
        )


def _shown(rows: frozenset[int]) -> str:
    first, last = min(rows), max(rows)
    is_run = len(rows) == last - first + 1 > 1
    return f"{first} to {last}" if is_run else ", ".join(map(str, sorted(rows)))


def _renew(model: LanguageModel, rows: range) -> None:
    """Gives the model rows for new tokens, in spare ones or behind the last."""
    if model.spec.adapters:
        raise ConfigError(
            "the model has adapters already",
            fix="add tokens first, then call get_peft_model",
        )
    tables = (model.decoder.embed_tokens, model.decoder.lm_head)
    for table in (table for table in tables if table is not None):
        table.weight.set_value(_renewed(table.weight.get_value(), rows))
    size = max(model.config.vocab_size, rows.stop)
    config = dataclasses.replace(model.config, vocab_size=size)
    model.spec = dataclasses.replace(model.spec, config=config)
    model.new_rows |= frozenset(rows)


def _renewed(table: Float[Array, "V D"], rows: range) -> Array:
    """Returns the table with the mean of the rows before `rows` in each of these."""
    mean = jnp.mean(table[: rows.start].astype(jnp.float32), axis=0)
    new = jnp.broadcast_to(mean.astype(table.dtype), (len(rows), table.shape[1]))
    return jnp.concatenate([table[: rows.start], new, table[rows.stop :]])
