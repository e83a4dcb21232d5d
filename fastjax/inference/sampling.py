"""The next token from the scores of all tokens."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fastjax.errors import ConfigError

_NOT_DRAWN = "temperature, top_k, top_p and min_p have no effect without do_sample=True"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn; the default takes the likeliest.

    Attributes:
      temperature: Divides the scores; 0 takes the likeliest token.
      top_k: Only so many of the likeliest tokens are drawn from; 0: all.
      top_p: Only the likeliest tokens that together reach this probability are
        (1904.09751).
      min_p: Only tokens at least this share as likely as the likeliest (2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be in [0, 1]")


def sampling_of(
    temperature: float | int | None,
    top_k: int | None,
    top_p: float | int | None,
    min_p: float | int | None,
    *,
    do_sample: bool,
) -> Sampling:
    """Returns how `generate` draws; warns its caller of what has no effect.

    None leaves the probabilities as they are, as in transformers.
    """
    temperature = 1.0 if temperature is None else temperature
    top_k, min_p = top_k or 0, min_p or 0.0
    top_p = 1.0 if top_p is None else top_p
    if not do_sample and (temperature, top_k, top_p, min_p) != (1, 0, 1, 0):
        warnings.warn(_NOT_DRAWN, stacklevel=3)
    return Sampling(
        temperature=float(temperature) if do_sample else 0.0,
        top_k=top_k,
        top_p=float(top_p),
        min_p=float(min_p),
    )


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Returns one token a row.

    Args:
      logits: Scores in float32.
      keys: One key a row, so that a row does not depend on its neighbours.
      sampling: How to draw.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / sampling.temperature
    if sampling.top_k:
        scores = _keep_top_k(scores, min(sampling.top_k, scores.shape[-1]))
    if sampling.top_p < 1:
        scores = _keep_top_p(scores, sampling.top_p)
    if sampling.min_p:
        scores = _keep_min_p(scores, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def _keep_top_k(scores: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    smallest = jax.lax.top_k(scores, k)[0][:, -1:]
    return jnp.where(scores >= _wide(smallest, scores), scores, -jnp.inf)


def _keep_top_p(scores: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    descending = -jnp.sort(-scores, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < p, descending, jnp.inf)
    smallest = jnp.min(kept, axis=-1, keepdims=True)
    return jnp.where(scores >= _wide(smallest, scores), scores, -jnp.inf)


def _keep_min_p(scores: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    smallest = jnp.max(scores, axis=-1, keepdims=True) + math.log(p)
    return jnp.where(scores >= _wide(smallest, scores), scores, -jnp.inf)


def _wide(
    column: Float[Array, "B 1"], like: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    return jnp.broadcast_to(column, like.shape)
