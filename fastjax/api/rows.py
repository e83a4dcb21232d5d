"""Rows of token ids as users give and get them: padding, masks, streams."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastjax.errors import ConfigError

_NEW_TOKENS = 128


def prompt_rows(
    input_ids: Any, attention_mask: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the rows as they are, and without padding."""
    rows = [np.asarray(row).tolist() for row in input_ids]
    if not all(isinstance(row, list) for row in rows):
        raise ConfigError(
            "input_ids must be rows of token ids, (B, T)",
            fix='for one prompt, give [ids], or tokenizer(..., return_tensors="np")',
        )
    if attention_mask is None:
        return rows, rows
    masks = [np.asarray(mask).tolist() for mask in attention_mask]
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ConfigError("attention_mask and input_ids have different shapes")
    pairs = zip(rows, masks, strict=True)
    return rows, [[t for t, kept in zip(*p, strict=True) if kept] for p in pairs]


def room_of(
    rows: list[list[int]], max_new_tokens: int | None, max_length: int | None
) -> int:
    """Returns how many tokens are added to rows at most, as transformers counts."""
    if max_new_tokens is not None or max_length is None:
        return _NEW_TOKENS if max_new_tokens is None else max_new_tokens
    width = max(map(len, rows), default=0)
    if max_length <= width:
        raise ConfigError(
            f"max_length={max_length} leaves no room beside a prompt of {width} tokens",
            fix="give max_new_tokens, which counts the new tokens alone",
        )
    return max_length - width


def pad_id_of(tokenizer: Any, config: Any, given: int | None) -> int:
    """Returns what fills rows: given, the tokenizer's, the model's, or an end."""
    own = getattr(tokenizer, "pad_token_id", None)
    known = (given, own, config.pad_token_id, *config.eos_token_ids)
    return next((int(value) for value in known if value is not None), 0)


def stop_ids_of(
    tokenizer: Any, config: Any, given: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Returns the tokens that end a text: those given, or the model's."""
    if isinstance(given, int):
        return (given,)
    if given is not None:
        return tuple(given)
    own = getattr(tokenizer, "eos_token_id", None)
    extra = () if own is None else (own,)
    return tuple(dict.fromkeys([*config.eos_token_ids, *extra]))


def padded_in_front(rows: list[list[int]], pad_id: int) -> np.ndarray:
    """Returns rows of one length, padded in front, so that answers begin together."""
    length = max(map(len, rows))
    padded = [[pad_id] * (length - len(row)) + row for row in rows]
    return np.asarray(padded, np.int64)


def stacked_rows(rows: list[list[int]], pad_id: int) -> np.ndarray:
    """Returns rows of one length, padded at their end."""
    table = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def open_stream(streamer: Any, prompts: list[list[int]]) -> None:
    """Gives a streamer the only prompt."""
    if len(prompts) > 1:
        raise ConfigError(f"a streamer takes one prompt, not {len(prompts)}")
    streamer.put(np.asarray(prompts[0]))


def feeding(streamer: Any) -> Callable[[list[list[int]]], None]:
    """Returns what gives a streamer the new tokens of a row."""

    def feed(new: list[list[int]]) -> None:
        for token in new[0]:
            streamer.put(np.asarray([token]))

    return feed
