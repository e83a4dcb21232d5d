"""The loss and its gradient from odds against the target, without logits in memory.

With `s` a row's own target logit, `E = exp(logits - s)` and `t` the sum of a row of E:
the loss is `log t`, the probabilities are `E / t`, and the gradient of the hidden
states is `(E @ head) / t - head[target]`. So one product, whose epilogue takes the
exponentials, and a second one are all that touch the vocabulary: no pass over logits
stands between them, and a chunk holds E in 16 bits, 2 V bytes a row.

E overflows where a logit is far above the target's. The sum of the row shows it, and
then everything is computed again by XLA, in chunks of its own.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from kernels.device import multiprocessors, require_hopper
from kernels.dispatch import UnsupportedOp
from kernels.persistent_product import TILE_K, TILE_M, tile_n_for

from . import vjp
from .adapter import HeadAdapter
from .mosaic_gpu import odds
from .options import Options
from .xla import Chunks, in_chunks, target_count

_LARGEST_SUM = math.exp(60)
"""Above it, products with the head might overflow float32 too."""

_RECOMPUTED_ROWS = 256
_DTYPES = ("bfloat16",)  # float16 ends at exp(11)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_cross_entropy(
    options: Options,
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    adapter: HeadAdapter | None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of -log p(target) and the number of targets.

    Raises:
      UnsupportedOp: Another device, or what the kernel lacks.
    """
    tile_n = _tile_n(options, hidden, head, adapter)

    def body(_: None, chunk: Chunks) -> tuple[None, tuple[jax.Array, jax.Array]]:
        exponentials = _exponentials(options, chunk, head, tile_n)
        return None, (exponentials.loss, exponentials.is_too_large)

    chunks = in_chunks(options, hidden, targets, multiple=TILE_M)
    _, (losses, is_too_large) = jax.lax.scan(body, None, chunks)

    def again() -> jax.Array:
        small = _in_small_chunks(options)
        return -jnp.sum(vjp.token_log_probs(small, hidden, head, targets, None))

    loss = jax.lax.cond(jnp.any(is_too_large), again, lambda: jnp.sum(losses))
    return loss, target_count(options, targets)


def _forward(
    options: Options,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    adapter: HeadAdapter | None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    tile_n = _tile_n(options, hidden, head, adapter)

    def body(_: None, chunk: Chunks) -> tuple[None, tuple[jax.Array, ...]]:
        found = _exponentials(options, chunk, head, tile_n)
        dhidden = _gradient(options, chunk, head, found)
        return None, (found.loss, found.is_too_large, dhidden)

    chunks = in_chunks(options, hidden, targets, multiple=TILE_M)
    _, (losses, is_too_large, dhidden) = jax.lax.scan(body, None, chunks)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]

    def again() -> tuple[jax.Array, jax.Array]:
        small = _in_small_chunks(options)
        loss, gradients = vjp.loss_and_gradients(small, hidden, head, targets, None)
        return loss, gradients[0]

    loss, dhidden = jax.lax.cond(
        jnp.any(is_too_large), again, lambda: (jnp.sum(losses), dhidden)
    )
    return (loss, target_count(options, targets)), dhidden


def _backward(
    options: Options, dhidden: jax.Array, douts: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None, None, None]:
    del options
    dhidden = (douts[0] * dhidden.astype(jnp.float32)).astype(dhidden.dtype)
    return dhidden, None, None, None


linear_cross_entropy.defvjp(_forward, _backward)


class _Exponentials(NamedTuple):
    """Those of a chunk, their sums by row, and what follows from the sums.

    Attributes:
      values: E.
      sums: Of its rows.
      own_rows: The head's rows of the targets.
      loss: Sum over the chunk.
      is_too_large: Some sum is, so nothing here is of use.
    """

    values: Float[Array, "M V"]
    sums: Float32[Array, " M"]
    own_rows: Float[Array, "M D"]
    loss: Float32[Array, ""]
    is_too_large: Bool[Array, ""]


def _exponentials(
    options: Options, chunk: Chunks, head: jax.Array, tile_n: int
) -> _Exponentials:
    is_target = chunk.targets != options.ignore_index
    # A target outside of the vocabulary makes the loss NaN, as by XLA.
    own_rows = head.at[jnp.where(is_target, chunk.targets, 0)].get(
        mode="fill", fill_value=jnp.nan
    )
    own_logits = jnp.sum(
        chunk.hidden.astype(jnp.float32) * own_rows.astype(jnp.float32), axis=1
    )
    values, sums = odds(
        chunk.hidden,
        head,
        own_logits,
        tile_n=tile_n,
        blocks=multiprocessors(),
    )
    return _Exponentials(
        values,
        sums,
        own_rows,
        loss=jnp.sum(jnp.where(is_target, jnp.log(sums), 0)),
        is_too_large=jnp.any(is_target & (sums >= _LARGEST_SUM)),
    )


def _gradient(
    options: Options, chunk: Chunks, head: jax.Array, found: _Exponentials
) -> Float[Array, "M D"]:
    mixed = jnp.dot(found.values, head, preferred_element_type=jnp.float32)
    dhidden = mixed / found.sums[:, None] - found.own_rows.astype(jnp.float32)
    is_target = chunk.targets != options.ignore_index
    return jnp.where(is_target[:, None], dhidden, 0).astype(chunk.hidden.dtype)


def _in_small_chunks(options: Options) -> Options:
    return dataclasses.replace(options, chunk_tokens=_RECOMPUTED_ROWS)


def _tile_n(
    options: Options,
    hidden: jax.Array,
    head: jax.Array,
    adapter: HeadAdapter | None,
) -> int:
    """Returns the columns of a tile, or raises `UnsupportedOp`."""
    require_hopper()
    if hidden.dtype.name not in _DTYPES or head.dtype != hidden.dtype:
        raise UnsupportedOp(f"{hidden.dtype=} and {head.dtype=} must be bfloat16")
    if options.softcap is not None:
        raise UnsupportedOp("the kernel has no softcap")
    if options.head_is_trainable:
        raise UnsupportedOp("the kernel has no gradient of the head")
    if adapter is not None:
        raise UnsupportedOp("the kernel has no adapter of the head")
    vocabulary, features = head.shape
    tile_n = tile_n_for(TILE_M, [vocabulary])
    if features % TILE_K:
        raise UnsupportedOp(f"{features=} must be a multiple of {TILE_K}")
    return tile_n
