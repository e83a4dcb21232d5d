"""Gradients of the chunked cross-entropy.

`linear_cross_entropy` computes the cotangent of `hidden` while the logits of the chunk
are there, and saves it: 2 D bytes a token in 16 bits, and no second product with the
head. `token_log_probs` weighs tokens by a cotangent known only later; it saves its
inputs and the log-sum-exp, 4 bytes a token, and computes the logits again.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from .adapter import HeadAdapter
from .options import Options
from .xla import (
    Chunks,
    Tables,
    chunk_gradients,
    in_chunks,
    logits_and_lse,
    tables,
    target_count,
    target_log_probs,
)

Gradients = tuple[jax.Array, jax.Array | None, HeadAdapter | None]
"""Of hidden states, a head that trains, and its adapter."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    adapter: HeadAdapter | None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of -log p(target) and the number of targets."""
    log_probs, _ = _log_probs_forward(options, hidden, head, targets, adapter)
    return -jnp.sum(log_probs), target_count(options, targets)


def loss_and_gradients(
    options: Options,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    adapter: HeadAdapter | None,
) -> tuple[jax.Array, Gradients]:
    """Returns the loss and its gradients, those of tables in float32."""
    weights = tables(hidden.dtype, head, adapter)

    def body(carry: tuple, chunk: Chunks) -> tuple[tuple, tuple]:
        loss, dtables = carry
        logits, lse = logits_and_lse(options, chunk, weights)
        log_probs = target_log_probs(options, logits, lse, chunk.targets)
        dchunk, part = chunk_gradients(
            options, chunk, weights, logits, lse, jnp.full_like(lse, -1)
        )
        carry = (loss - jnp.sum(log_probs), jax.tree.map(jnp.add, dtables, part))
        return carry, dchunk

    carry = (jnp.float32(0), _no_gradients(options, weights))
    chunks = in_chunks(options, hidden, targets, adapter)
    (loss, dtables), dchunks = jax.lax.scan(body, carry, chunks)
    return loss, _gradients(dchunks, dtables, hidden.shape[0])


def _loss_forward(
    options: Options,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    adapter: HeadAdapter | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Gradients, Gradients]]:
    loss, gradients = loss_and_gradients(options, hidden, head, targets, adapter)
    # Empty arrays carry the dtypes to the backward pass.
    trained = (hidden, head if options.head_is_trainable else None, adapter)
    dtypes = jax.tree.map(lambda array: array[:0], trained)
    return (loss, target_count(options, targets)), (gradients, dtypes)


def _loss_backward(
    options: Options,
    residuals: tuple[Gradients, Gradients],
    douts: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array | None, None, HeadAdapter | None]:
    del options

    def scaled(gradient: jax.Array, like: jax.Array) -> jax.Array:
        return (douts[0] * gradient.astype(jnp.float32)).astype(like.dtype)

    dhidden, dhead, dadapter = jax.tree.map(scaled, *residuals)
    return dhidden, dhead, None, dadapter


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_log_probs(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    adapter: HeadAdapter | None,
) -> Float32[Array, " M"]:
    """Returns log p(target), 0 where the target is ignored."""
    return _log_probs_forward(options, hidden, head, targets, adapter)[0]


def _log_probs_forward(
    options: Options,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    adapter: HeadAdapter | None,
) -> tuple[jax.Array, tuple]:
    weights = tables(hidden.dtype, head, adapter)

    def body(_: None, chunk: Chunks) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits, lse = logits_and_lse(options, chunk, weights)
        return None, (target_log_probs(options, logits, lse, chunk.targets), lse)

    chunks = in_chunks(options, hidden, targets, adapter)
    _, (log_probs, lse) = jax.lax.scan(body, None, chunks)
    log_probs = log_probs.reshape(-1)[: hidden.shape[0]]
    return log_probs, (hidden, head, targets, adapter, lse)


def _log_probs_backward(
    options: Options, residuals: tuple, dlog_probs: jax.Array
) -> tuple[jax.Array, jax.Array | None, None, HeadAdapter | None]:
    hidden, head, targets, adapter, lse = residuals
    weights = tables(hidden.dtype, head, adapter)

    def body(dtables: Tables, inputs: tuple) -> tuple[Tables, tuple]:
        chunk, lse, dlog_probs = inputs
        logits, _ = logits_and_lse(options, chunk, weights)
        dchunk, part = chunk_gradients(options, chunk, weights, logits, lse, dlog_probs)
        return jax.tree.map(jnp.add, dtables, part), dchunk

    chunks = in_chunks(options, hidden, targets, adapter)
    dlog_probs = jnp.pad(dlog_probs, (0, lse.size - dlog_probs.size))
    inputs = (chunks, lse, dlog_probs.reshape(lse.shape))
    dtables, dchunks = jax.lax.scan(body, _no_gradients(options, weights), inputs)
    dhidden, dhead, dadapter = _gradients(dchunks, dtables, hidden.shape[0])
    if dhead is not None:
        dhead = dhead.astype(head.dtype)
    if dadapter is not None:
        dadapter = dadapter._replace(up=dadapter.up.astype(adapter.up.dtype))
    return dhidden, dhead, None, dadapter


def _no_gradients(options: Options, weights: Tables) -> Tables:
    trained = weights if options.head_is_trainable else weights._replace(head=None)
    return jax.tree.map(lambda table: jnp.zeros_like(table, dtype=jnp.float32), trained)


def _gradients(dchunks: tuple, dtables: Tables, rows: int) -> Gradients:
    """Returns gradients of `rows` rows from those of all chunks."""
    dhidden, ddown = jax.tree.map(
        lambda array: array.reshape(-1, array.shape[-1])[:rows], dchunks
    )
    adapter = None if dtables.up is None else HeadAdapter(ddown, dtables.up)
    return dhidden, dtables.head, adapter


linear_cross_entropy.defvjp(_loss_forward, _loss_backward)
token_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
