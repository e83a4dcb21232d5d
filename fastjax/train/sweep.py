"""The training step of several adapters at once, over one frozen base, by `vmap`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fastjax.config import DType
from fastjax.errors import DataError
from fastjax.train.batches import Loader
from fastjax.train.evaluate import EvalResult
from fastjax.train.optimizer import Optimizer
from fastjax.train.state import TrainState
from fastjax.train.step import Batch, LossFunction, Metrics, make_train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What the adapters of a sweep do not share, beside their weights.

    Attributes:
      learning_rate: Peak of the schedule, float32.
      table_factor: Of that rate for embeddings and output head, float32.
      seed: Of dropout, uint32.
      own: Variables of the model that do not train and differ: the scalings.
    """

    learning_rate: Any
    table_factor: Any
    seed: Any
    own: Any


Base = tuple[Variant, PyTree]


def stacked[T: (Variant, TrainState)](items: Sequence[T]) -> T:
    """Returns equal trees as one tree, whose arrays have a leading axis of items."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def item_of(tree: PyTree, index: int) -> PyTree:
    """Returns one of the trees of `stacked`."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def make_sweep_step(
    loss_function: LossFunction,
    optimizer: Optimizer,
    *,
    has_dropout: bool,
    dtype: DType,
) -> Callable[[TrainState, Base, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step `(states, base, batch) -> (states, metrics)`.

    States and metrics have a leading axis of adapters; `base` is their variants,
    stacked alike, and the frozen variables that all share, as they share the batch.
    Each does what `make_train_step` does, but for the order of sums. The states are
    donated.

    Args:
      loss_function: Of one micro-batch.
      optimizer: Its schedule peaks at 1.
      has_dropout: Makes keys for dropout.
      dtype: Of the activations.
    """

    def step(state: TrainState, base: Base, batch: Batch) -> tuple[TrainState, Metrics]:
        variant, frozen = base
        rate = variant.learning_rate
        own = dataclasses.replace(
            optimizer,
            schedule=lambda count: rate * optimizer.schedule(count),
            table_factor=variant.table_factor,
        )
        train_step = make_train_step(
            _of(variant, loss_function),
            own,
            seed=variant.seed,
            has_dropout=has_dropout,
            dtype=dtype,
        )
        return train_step(state, frozen, batch)

    return jax.jit(jax.vmap(step, in_axes=(0, (0, None), None)), donate_argnums=0)


def make_sweep_eval_step(
    loss_function: LossFunction,
) -> Callable[[PyTree, Base, Batch], tuple[Array, Array]]:
    """Returns the jitted `(trainable, base, batch) -> (Σloss, Σtokens)`, by adapter."""

    def eval_step(
        trainable: PyTree, base: Base, batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        variant, frozen = base

        def one(micro_batch: Any) -> tuple[Array, Array]:
            loss = _of(variant, loss_function)
            return loss(trainable, frozen, micro_batch, dropout_key=None)

        losses, tokens = jax.lax.map(one, dict(batch))
        return jnp.sum(losses), jnp.sum(tokens)

    return jax.jit(jax.vmap(eval_step, in_axes=(0, (0, None), None)))


def evaluate_sweep(
    eval_step: Callable[[PyTree, Base, Batch], tuple[Array, Array]],
    trainable: PyTree,
    base: Base,
    loader: Loader,
) -> list[EvalResult]:
    """Returns the evaluation of each adapter over one pass of the loader.

    Raises:
      DataError: No token of the set carries loss.
    """
    start = time.perf_counter()
    losses = tokens = np.zeros(len(jax.tree.leaves(base[0])[0]))
    for step in range(loader.steps_per_epoch):
        batch = jax.device_put(dict(loader.batch(step)))
        sums = jax.device_get(eval_step(trainable, base, batch))
        losses = losses + np.asarray(sums[0], np.float64)
        tokens = tokens + np.asarray(sums[1], np.float64)
    if not np.all(tokens):
        raise DataError(
            "no token of the evaluation set carries loss",
            fix="raise max_length, or set train_on to all",
        )
    seconds = time.perf_counter() - start
    return [
        EvalResult(loss=loss / count, num_tokens=int(count), runtime_seconds=seconds)
        for loss, count in zip(losses.tolist(), tokens.tolist(), strict=True)
    ]


def _of(variant: Variant, loss_function: LossFunction) -> LossFunction:
    """Returns the loss with the variant's own variables among the frozen ones."""

    def loss(
        trainable: PyTree,
        frozen: PyTree,
        batch: Any,
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        whole = nnx.merge_state(variant.own, frozen)
        return loss_function(trainable, whole, batch, dropout_key=dropout_key)

    return loss
