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

from .options import Options
from .xla import (
    Chunks,
    chunk_gradients,
    in_chunks,
    logits_and_lse,
    target_count,
    target_log_probs,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of -log p(target) and the number of targets."""
    log_probs, _ = _log_probs_forward(options, hidden, head, targets)
    return -jnp.sum(log_probs), target_count(options, targets)


def loss_and_gradient(
    options: Options, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the loss, the cotangent of `hidden` and that of a head that trains."""
    weight = head.astype(hidden.dtype)

    def body(carry: tuple, chunk: Chunks) -> tuple[tuple, jax.Array]:
        loss, dhead = carry
        logits, lse = logits_and_lse(options, chunk.hidden, weight)
        log_probs = target_log_probs(options, logits, lse, chunk.targets)
        dhidden, dhead_part = chunk_gradients(
            options, chunk, weight, logits, lse, jnp.full_like(lse, -1)
        )
        loss = loss - jnp.sum(log_probs)
        return (loss, _accumulated(dhead, dhead_part)), dhidden

    carry = (jnp.float32(0), _initial_dhead(options, head))
    chunks = in_chunks(options, hidden, targets)
    (loss, dhead), dhidden = jax.lax.scan(body, carry, chunks)
    return loss, dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dhead


def _loss_forward(
    options: Options, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None, jax.Array]]:
    loss, dhidden, dhead = loss_and_gradient(options, hidden, head, targets)
    # An empty array carries the head's dtype to the backward pass.
    return (loss, target_count(options, targets)), (dhidden, dhead, head[:0])


def _loss_backward(
    options: Options, residuals: tuple, douts: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array | None, None]:
    del options
    dhidden, dhead, head = residuals
    dloss = douts[0]
    dhidden = (dloss * dhidden.astype(jnp.float32)).astype(dhidden.dtype)
    if dhead is not None:
        dhead = (dloss * dhead).astype(head.dtype)
    return dhidden, dhead, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_log_probs(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
) -> Float32[Array, " M"]:
    """Returns log p(target), 0 where the target is ignored."""
    return _log_probs_forward(options, hidden, head, targets)[0]


def _log_probs_forward(
    options: Options, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weight = head.astype(hidden.dtype)

    def body(_: None, chunk: Chunks) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits, lse = logits_and_lse(options, chunk.hidden, weight)
        return None, (target_log_probs(options, logits, lse, chunk.targets), lse)

    chunks = in_chunks(options, hidden, targets)
    _, (log_probs, lse) = jax.lax.scan(body, None, chunks)
    log_probs = log_probs.reshape(-1)[: hidden.shape[0]]
    return log_probs, (hidden, head, targets, lse)


def _log_probs_backward(
    options: Options, residuals: tuple[jax.Array, ...], dlog_probs: jax.Array
) -> tuple[jax.Array, jax.Array | None, None]:
    hidden, head, targets, lse = residuals
    weight = head.astype(hidden.dtype)

    def body(dhead: jax.Array | None, inputs: tuple) -> tuple:
        chunk, lse, dlog_probs = inputs
        logits, _ = logits_and_lse(options, chunk.hidden, weight)
        dhidden, dhead_part = chunk_gradients(
            options, chunk, weight, logits, lse, dlog_probs
        )
        return _accumulated(dhead, dhead_part), dhidden

    chunks = in_chunks(options, hidden, targets)
    dlog_probs = jnp.pad(dlog_probs, (0, lse.size - dlog_probs.size))
    inputs = (chunks, lse, dlog_probs.reshape(lse.shape))
    dhead, dhidden = jax.lax.scan(body, _initial_dhead(options, head), inputs)
    if dhead is not None:
        dhead = dhead.astype(head.dtype)
    return dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dhead, None


def _initial_dhead(options: Options, head: jax.Array) -> jax.Array | None:
    if not options.head_is_trainable:
        return None
    return jnp.zeros_like(head, dtype=jnp.float32)


def _accumulated(dhead: jax.Array | None, part: jax.Array | None) -> jax.Array | None:
    return None if dhead is None or part is None else dhead + part


linear_cross_entropy.defvjp(_loss_forward, _loss_backward)
token_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
