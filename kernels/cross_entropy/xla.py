"""Cross-entropy over chunks of rows, each against the full vocabulary.

The largest temporary is one chunk of logits in float32. Chunking the vocabulary as well
would make the matrix products too small to run well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from .adapter import HeadAdapter
from .options import Options

_ALIGNMENT = 8  # columns that tensor cores load at once


class Chunks(NamedTuple):
    """Rows in chunks of equal size; inside a scan, one of them."""

    hidden: Float[Array, "*N M D"]
    targets: Int[Array, "*N M"]


def joined(
    hidden: Float[Array, "M D"], head: Float[Array, "V D"], adapter: HeadAdapter | None
) -> tuple[Float[Array, "M C"], Float[Array, "V C"]]:
    """Returns both in the dtype of `hidden`, each with the adapter's columns beside.

    So one product gives all of the logits. A second one would write another chunk of
    them in float32 for three passes to read, and of an 8B model as much as the copies.
    """
    head = head.astype(hidden.dtype)
    if adapter is None:
        return hidden, head
    padding = ((0, 0), (0, -adapter.down.shape[1] % _ALIGNMENT))
    down, up = (jnp.pad(part.astype(hidden.dtype), padding) for part in adapter)
    return jnp.concatenate([hidden, down], 1), jnp.concatenate([head, up], 1)


def in_chunks(
    options: Options, hidden: jax.Array, targets: jax.Array, *, multiple: int = 1
) -> Chunks:
    """Cuts rows into the fewest chunks of at most `chunk_tokens`, about equal.

    The last is filled up with ignored targets, and each to a `multiple` of rows.
    """
    rows = hidden.shape[0]
    count = max(1, -(-rows // options.chunk_tokens))
    padding = -rows % (count * multiple)
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding), constant_values=options.ignore_index)
    return Chunks(
        hidden.reshape(count, -1, hidden.shape[-1]), targets.reshape(count, -1)
    )


def target_count(options: Options, targets: Int[Array, " M"]) -> Float32[Array, ""]:
    """Returns how many targets are not ignored."""
    return jnp.sum(targets != options.ignore_index, dtype=jnp.float32)


def logits_and_lse(
    options: Options, hidden: Float[Array, "M D"], head: Float[Array, "V D"]
) -> tuple[Float32[Array, "M V"], Float32[Array, " M"]]:
    """Returns the logits of a chunk and their log-sum-exp."""
    logits = _product(hidden, head.T)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits, jax.nn.logsumexp(logits, axis=1)


def target_log_probs(
    options: Options, logits: jax.Array, lse: jax.Array, targets: jax.Array
) -> Float32[Array, " M"]:
    """Returns log p(target) of a chunk, 0 where the target is ignored."""
    is_target = targets != options.ignore_index
    index = jnp.where(is_target, targets, 0)[:, None]
    own = jnp.take_along_axis(logits, index, axis=1)[:, 0]
    return jnp.where(is_target, own - lse, 0)


def chunk_gradients(
    options: Options,
    chunk: Chunks,
    head: Float[Array, "V D"],
    logits: Float32[Array, "M V"],
    lse: Float32[Array, " M"],
    dlog_probs: Float32[Array, " M"],
    *,
    frozen: int,
) -> tuple[Float[Array, "M D"], Float32[Array, "V _"]]:
    """Returns the cotangents of a chunk's hidden states and of the head.

    Of the head without its first `frozen` columns; nothing is computed for these.
    The logits' cotangent takes the dtype of the hidden states before it is multiplied:
    left in float32 it would run on TF32 units, or slower ones.
    """
    tokens = jax.lax.broadcasted_iota(chunk.targets.dtype, logits.shape, 1)
    own = (tokens == chunk.targets[:, None]).astype(jnp.float32)
    weight = jnp.where(chunk.targets != options.ignore_index, dlog_probs, 0)
    dlogits = weight[:, None] * (own - jnp.exp(logits - lse[:, None]))
    if options.softcap is not None:
        dlogits = dlogits * (1 - jnp.square(logits / options.softcap))
    dlogits = dlogits.astype(chunk.hidden.dtype)
    dhidden = _product(dlogits, head).astype(chunk.hidden.dtype)
    trained = chunk.hidden[:, frozen:]
    if not trained.shape[1]:
        return dhidden, jnp.zeros((head.shape[0], 0), jnp.float32)
    return dhidden, _product(dlogits.T, trained)


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `lhs @ rhs` in float32, without TF32 where the inputs are float32."""
    is_float32 = lhs.dtype == jnp.float32
    return jnp.dot(
        lhs,
        rhs,
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=jnp.float32,
    )
