"""Cross-entropy from the whole logits in float32, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from .adapter import HeadAdapter
from .options import Options


def linear_cross_entropy(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    adapter: HeadAdapter | None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of -log p(target) and the number of targets."""
    count = jnp.sum(targets != options.ignore_index, dtype=jnp.float32)
    log_probs = token_log_probs(options, hidden, head, targets, adapter)
    return -jnp.sum(log_probs), count


def token_log_probs(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    adapter: HeadAdapter | None,
) -> Float32[Array, " M"]:
    """Returns log p(target), 0 where the target is ignored."""
    if not options.head_is_trainable:
        head = jax.lax.stop_gradient(head)
    logits = _product(hidden, head.T)
    if adapter is not None:
        logits = logits + _product(adapter.down, adapter.up.T)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    is_target = targets != options.ignore_index
    index = jnp.where(is_target, targets, 0)[:, None]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=1)[:, 0]
    return jnp.where(is_target, log_probs, 0)


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `lhs @ rhs` of float32 numbers."""
    return jnp.dot(
        lhs.astype(jnp.float32),
        rhs.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
