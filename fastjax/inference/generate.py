"""Text generation: prompts of different lengths in one batch, with a KV cache."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from fastjax.errors import ConfigError, DataError
from fastjax.inference.sampling import Sampling, sample
from fastjax.nn.decoder import Decoder
from fastjax.nn.kv_cache import KVCache

# Lengths are rounded up to this or a power of two times it, so that a model is compiled
# for a handful of shapes, however long the prompts are.
_SHORTEST = 64
_TOKENS_PER_CALL = 8


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Returns the tokens that continue each prompt, its stop token included.

    A row's tokens do not depend on the other rows: row i draws with the seed
    `seed + i`, and padding is never seen.

    Args:
      decoder: The model.
      prompts: Token ids of each prompt, at least one each.
      max_new_tokens: Most tokens that are added to a prompt.
      stop_ids: Any of these ends its row.
      sampling: How tokens are drawn; None takes the likeliest.
      seed: Of the drawing.
      on_tokens: Called with each row's new tokens as they come (streaming).

    Raises:
      ConfigError: A prompt is empty, or `max_new_tokens` is not positive.
      DataError: A token is outside the embedding.
    """
    _check(prompts, max_new_tokens)
    require_known_tokens(prompts, decoder)
    graphdef, state = nnx.split(decoder)
    ids, lengths = _padded(prompts)
    slots = _rounded(int(lengths.max()) + max_new_tokens)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)) + seed)
    step = functools.partial(_continue, graphdef, sampling or Sampling())
    token, cache = _start(
        graphdef, sampling or Sampling(), state, ids, lengths, keys, slots
    )
    rows = _Rows(len(prompts), stop_ids, max_new_tokens, on_tokens)
    rows.add(np.asarray(token)[:, None])
    position = jnp.asarray(lengths)
    count = 1 if on_tokens else _TOKENS_PER_CALL
    while not rows.are_done():
        tokens, cache = step(state, token, position, cache, keys, count)
        token, position = tokens[:, -1], position + count
        rows.add(np.asarray(tokens))
    return rows.tokens


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def _start(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    state: nnx.State,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    slots: int,
) -> tuple[Int[Array, " B"], KVCache]:
    """Reads the prompts and returns the first new tokens and the cache."""
    decoder = nnx.merge(graphdef, state)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    is_token = places < jnp.broadcast_to(lengths[:, None], ids.shape)
    positions = jnp.where(is_token, places, slots)
    cache = decoder.empty_cache(ids.shape[0], slots)
    hidden, cache = decoder.decode(
        ids, positions=positions, cache=cache, is_prefill=True
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _draw(decoder, last, lengths, keys, sampling), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 7), donate_argnames=("cache",))
def _continue(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    state: nnx.State,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    cache: KVCache,
    keys: Key[Array, " B"],
    count: int,
) -> tuple[Int[Array, "B C"], KVCache]:
    """Returns the next `count` tokens of each row, and the cache without the last."""
    decoder = nnx.merge(graphdef, state)

    def step(carry: tuple, _: None) -> tuple[tuple, Int[Array, " B"]]:
        token, position, cache = carry
        hidden, cache = decoder.decode(
            token[:, None], positions=position[:, None], cache=cache
        )
        token = _draw(decoder, hidden[:, 0], position + 1, keys, sampling)
        return (token, position + 1, cache), token

    carry = (token, position, cache)
    (_, _, cache), tokens = jax.lax.scan(step, carry, None, length=count)
    return tokens.T, cache


def _draw(
    decoder: Decoder,
    hidden: Array,
    position: Int[Array, " B"],
    keys: Key[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    now = jax.vmap(jax.random.fold_in)(keys, position)
    return sample(decoder.logits(hidden), now, sampling)


class _Rows:
    """New tokens of each row so far, cut at the first stop token."""

    def __init__(
        self,
        count: int,
        stop_ids: Sequence[int],
        limit: int,
        on_tokens: Callable[[list[list[int]]], None] | None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._stopped = [False] * count
        self._stops = frozenset(stop_ids)
        self._limit = limit
        self._on_tokens = on_tokens

    def add(self, tokens: np.ndarray) -> None:
        """Takes (B, C) new tokens."""
        before = [len(row) for row in self.tokens]
        for row, new in enumerate(tokens.tolist()):
            for token in new:
                if self._stopped[row] or len(self.tokens[row]) >= self._limit:
                    break
                self.tokens[row].append(token)
                self._stopped[row] = token in self._stops
        if self._on_tokens is not None:
            added = zip(self.tokens, before, strict=True)
            self._on_tokens([row[start:] for row, start in added])

    def are_done(self) -> bool:
        """Whether every row has stopped or is full."""
        return all(
            stopped or len(row) >= self._limit
            for row, stopped in zip(self.tokens, self._stopped, strict=True)
        )


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty or not prompts:
        raise ConfigError(
            f"prompts {empty} are empty" if prompts else "there are no prompts",
            fix="give each prompt at least one token, such as the beginning of text",
        )


def require_known_tokens(rows: Iterable[Sequence[int]], decoder: Decoder) -> None:
    """Returns when the embedding has a row for each token; indexing would not tell.

    Raises:
      DataError: It has not.
    """
    size = decoder.embed_tokens.weight.get_value().shape[0]
    wrong = [token for row in rows for token in row if not 0 <= token < size]
    if wrong:
        raise DataError(
            f"token {wrong[0]} is outside the embedding, which has {size} rows",
            fix="use the tokenizer of this model",
            code="FJ-DATA-VOCABULARY",
        )


def _padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), _rounded(int(lengths.max()))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def _rounded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
