"""The training step: one jitted function, state donated, micro-batches added up."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

from fastjax.config import DType
from fastjax.train.optimizer import Optimizer, as_float32
from fastjax.train.state import TrainState

Batch = Mapping[str, Int[Array, "A B S"]]
Metrics = dict[str, Array]


@runtime_checkable
class LossFunction(Protocol):
    """A loss over one micro-batch: its sum over tokens, and the number of tokens."""

    def __call__(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: Mapping[str, Int[Array, "B S"]],
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]: ...


def summed_gradients(
    loss_function: LossFunction,
    trainable: PyTree,
    frozen: PyTree,
    batch: Batch,
    *,
    factor: Float[Array, ""],
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
    """Returns the float32 gradient of `factor * Σloss`, Σloss and Σtokens.

    The sums run over all micro-batches, so every split of the same rows gives the
    same three values.

    Args:
      loss_function: Called once for each of the A micro-batches, one after another.
      trainable: Differentiated.
      frozen: Not differentiated.
      batch: Arrays with a leading axis of micro-batches.
      factor: Keeps small gradients of float16 from vanishing; else 1.
      dropout_key: Key of the step; each micro-batch folds in its index.
    """

    def scaled(
        weights: PyTree, micro_batch: Any, index: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        loss, tokens = loss_function(weights, frozen, micro_batch, dropout_key=key)
        return loss * factor, (loss, tokens)

    def one(micro_batch: Any, index: Int[Array, ""]) -> tuple[PyTree, Array, Array]:
        gradients, (loss, tokens) = jax.grad(scaled, has_aux=True)(
            trainable, micro_batch, index
        )
        return as_float32(gradients), loss, tokens

    count = next(iter(batch.values())).shape[0]
    if count == 1:
        return one({name: array[0] for name, array in batch.items()}, jnp.int32(0))

    def add(sums: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, one(*item)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    start = (zeros, jnp.float32(0.0), jnp.float32(0.0))
    sums, _ = jax.lax.scan(add, start, (dict(batch), jnp.arange(count)))
    return sums


def make_train_step(
    loss_function: LossFunction,
    optimizer: Optimizer,
    *,
    seed: int | UInt32[Array, ""],
    has_dropout: bool = False,
    dtype: DType = "float32",
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step `(state, frozen, batch) -> (state, metrics)`.

    The state is donated. An update whose loss or gradient is not finite is left out:
    weights and optimiser stay as they were and `skipped` is 1. The metrics are
    float32 scalars: loss (mean over trained tokens), grad_norm (before clipping),
    learning_rate, num_tokens (trained), skipped, loss_scale (used by this step).

    Args:
      loss_function: Of one micro-batch.
      optimizer: From `make_optimizer`.
      seed: Dropout of micro-batch i is keyed by (seed, step, i) and nothing else.
      has_dropout: Makes those keys.
      dtype: Of the activations; float16 turns on dynamic loss scaling.
    """

    def train_step(
        state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        step = state.step
        key = jax.random.fold_in(jax.random.key(seed), step) if has_dropout else None
        factor = state.loss_scale.scale * _unit(batch, dtype)
        sums, loss_sum, tokens = summed_gradients(
            loss_function,
            state.trainable,
            frozen,
            batch,
            factor=factor,
            dropout_key=key,
        )
        divisor = jnp.maximum(tokens, 1.0)
        gradients = jax.tree.map(lambda g: g / (factor * divisor), sums)
        loss, grad_norm = loss_sum / divisor, optax.tree.norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": optimizer.schedule(step),
            "num_tokens": tokens,
            "skipped": 1.0 - is_finite.astype(jnp.float32),
            "loss_scale": state.loss_scale.scale,
        }
        with jax.named_scope("optimizer"):
            state = _advanced(state, optimizer, gradients, is_finite, dtype)
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)


def _advanced(
    state: TrainState,
    optimizer: Optimizer,
    gradients: PyTree,
    is_finite: Bool[Array, ""],
    dtype: DType,
) -> TrainState:
    """Returns the state after the step; without the update where it is not finite."""
    trainable, opt_state = optimizer.update(
        gradients, state.opt_state, state.trainable, state.step, is_finite=is_finite
    )
    scale = state.loss_scale
    return TrainState(
        trainable=trainable,
        opt_state=opt_state,
        step=state.step + 1,
        loss_scale=scale.after(is_finite) if dtype == "float16" else scale,
    )


def _unit(batch: Batch, dtype: DType) -> float:
    """Returns a power of two near 1 / (slots of a micro-batch) for float16, else 1.

    Σloss is larger than the mean by the number of tokens, which would overflow.
    """
    if dtype != "float16":
        return 1.0
    _, rows, slots = next(iter(batch.values())).shape
    return 2.0 ** -math.floor(math.log2(rows * slots))
