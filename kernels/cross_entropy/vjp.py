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
    chunk_gradients,
    in_chunks,
    joined,
    logits_and_lse,
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
    joined_hidden, joined_head = joined(hidden, head, adapter)
    frozen = _frozen_columns(options, head)

    def body(carry: tuple, chunk: Chunks) -> tuple[tuple, jax.Array]:
        loss, dhead = carry
        logits, lse = logits_and_lse(options, chunk.hidden, joined_head)
        log_probs = target_log_probs(options, logits, lse, chunk.targets)
        dlog_probs = jnp.full_like(lse, -1)
        dhidden, part = chunk_gradients(
            options, chunk, joined_head, logits, lse, dlog_probs, frozen=frozen
        )
        return (loss - jnp.sum(log_probs), dhead + part), dhidden

    carry = (jnp.float32(0), _no_gradient(joined_head, frozen))
    chunks = in_chunks(options, joined_hidden, targets)
    (loss, dhead), dhidden = jax.lax.scan(body, carry, chunks)
    return loss, _gradients(options, dhidden, dhead, (hidden, head, adapter))


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
    joined_hidden, joined_head = joined(hidden, head, adapter)

    def body(_: None, chunk: Chunks) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits, lse = logits_and_lse(options, chunk.hidden, joined_head)
        return None, (target_log_probs(options, logits, lse, chunk.targets), lse)

    chunks = in_chunks(options, joined_hidden, targets)
    _, (log_probs, lse) = jax.lax.scan(body, None, chunks)
    log_probs = log_probs.reshape(-1)[: hidden.shape[0]]
    return log_probs, (hidden, head, targets, adapter, lse)


def _log_probs_backward(
    options: Options, residuals: tuple, dlog_probs: jax.Array
) -> tuple[jax.Array, jax.Array | None, None, HeadAdapter | None]:
    hidden, head, targets, adapter, lse = residuals
    joined_hidden, joined_head = joined(hidden, head, adapter)
    frozen = _frozen_columns(options, head)

    def body(dhead: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        chunk, lse, dlog_probs = inputs
        logits, _ = logits_and_lse(options, chunk.hidden, joined_head)
        dhidden, part = chunk_gradients(
            options, chunk, joined_head, logits, lse, dlog_probs, frozen=frozen
        )
        return dhead + part, dhidden

    chunks = in_chunks(options, joined_hidden, targets)
    dlog_probs = jnp.pad(dlog_probs, (0, lse.size - dlog_probs.size))
    inputs = (chunks, lse, dlog_probs.reshape(lse.shape))
    dhead, dhidden = jax.lax.scan(body, _no_gradient(joined_head, frozen), inputs)
    dhidden, dhead, dadapter = _gradients(
        options, dhidden, dhead, (hidden, head, adapter)
    )
    if dhead is not None:
        dhead = dhead.astype(head.dtype)
    if dadapter is not None:
        dadapter = dadapter._replace(up=dadapter.up.astype(adapter.up.dtype))
    return dhidden, dhead, None, dadapter


def _frozen_columns(options: Options, head: jax.Array) -> int:
    """Returns how many columns of the joined head get no gradient."""
    return 0 if options.head_is_trainable else head.shape[1]


def _no_gradient(joined_head: jax.Array, frozen: int) -> jax.Array:
    return jnp.zeros_like(joined_head[:, frozen:], dtype=jnp.float32)


def _gradients(
    options: Options,
    dhidden: jax.Array,
    dhead: jax.Array,
    inputs: tuple[jax.Array, jax.Array, HeadAdapter | None],
) -> Gradients:
    """Returns the gradients of the inputs from those of what was joined of them."""
    hidden, head, adapter = inputs
    (rows, features), frozen = hidden.shape, _frozen_columns(options, head)
    dhidden = dhidden.reshape(-1, dhidden.shape[-1])[:rows]
    trained = dhead[:, :features] if options.head_is_trainable else None
    if adapter is None:
        return dhidden, trained, None
    rank = adapter.up.shape[1]
    down = dhidden[:, features : features + rank]
    first = features - frozen
    up = dhead[:, first : first + rank]
    return dhidden[:, :features], trained, HeadAdapter(down, up)


linear_cross_entropy.defvjp(_loss_forward, _loss_backward)
token_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
