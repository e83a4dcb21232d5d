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


class Chunks(NamedTuple):
    """Rows in chunks of equal size; inside a scan, one of them.

    Attributes:
      hidden: Hidden states.
      targets: Of each row.
      down: Of the head's adapter, where it has one.
    """

    hidden: Float[Array, "*N M D"]
    targets: Int[Array, "*N M"]
    down: Float[Array, "*N M R"] | None


class Tables(NamedTuple):
    """What each chunk is multiplied with, or the float32 gradients of it.

    Attributes:
      head: Output table; no gradient unless it trains.
      up: Of its adapter, where it has one.
    """

    head: Float[Array, "V D"] | None
    up: Float[Array, "V R"] | None


def tables(
    dtype: jax.typing.DTypeLike, head: jax.Array, adapter: HeadAdapter | None
) -> Tables:
    """Returns the tables in a dtype."""
    up = None if adapter is None else adapter.up.astype(dtype)
    return Tables(head.astype(dtype), up)


def in_chunks(
    options: Options,
    hidden: jax.Array,
    targets: jax.Array,
    adapter: HeadAdapter | None = None,
    *,
    multiple: int = 1,
) -> Chunks:
    """Cuts rows into the fewest chunks of at most `chunk_tokens`, about equal.

    The last is filled up with ignored targets, and each to a `multiple` of rows.
    """
    rows = hidden.shape[0]
    count = max(1, -(-rows // options.chunk_tokens))
    padding = -rows % (count * multiple)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, padding), (0, 0)))
        return padded.reshape(count, -1, array.shape[-1])

    targets = jnp.pad(targets, (0, padding), constant_values=options.ignore_index)
    down = None if adapter is None else cut(adapter.down)
    return Chunks(cut(hidden), targets.reshape(count, -1), down)


def target_count(options: Options, targets: Int[Array, " M"]) -> Float32[Array, ""]:
    """Returns how many targets are not ignored."""
    return jnp.sum(targets != options.ignore_index, dtype=jnp.float32)


def logits_and_lse(
    options: Options, chunk: Chunks, tables: Tables
) -> tuple[Float32[Array, "M V"], Float32[Array, " M"]]:
    """Returns the logits of a chunk and their log-sum-exp."""
    logits = _product(chunk.hidden, _present(tables.head).T)
    if chunk.down is not None:
        logits = logits + _product(chunk.down, _present(tables.up).T)
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
    tables: Tables,
    logits: Float32[Array, "M V"],
    lse: Float32[Array, " M"],
    dlog_probs: Float32[Array, " M"],
) -> tuple[tuple[Float[Array, "M D"], Float[Array, "M R"] | None], Tables]:
    """Returns the cotangents of a chunk, its hidden states and `down`, and of tables.

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
    dhidden = _product(dlogits, _present(tables.head)).astype(dlogits.dtype)
    dhead = _product(dlogits.T, chunk.hidden) if options.head_is_trainable else None
    if chunk.down is None:
        return (dhidden, None), Tables(dhead, None)
    ddown = _product(dlogits, _present(tables.up)).astype(dlogits.dtype)
    return (dhidden, ddown), Tables(dhead, _product(dlogits.T, chunk.down))


def _present(table: jax.Array | None) -> jax.Array:
    assert table is not None
    return table


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `lhs @ rhs` in float32, without TF32 where the inputs are float32."""
    is_float32 = lhs.dtype == jnp.float32
    return jnp.dot(
        lhs,
        rhs,
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=jnp.float32,
    )
