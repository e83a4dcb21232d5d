"""Evaluation: the training loss, averaged over the tokens of a held-out set."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fastjax.errors import DataError
from fastjax.train.batches import Loader
from fastjax.train.step import Batch, LossFunction

EvalStep = Callable[[PyTree, PyTree, Batch], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The outcome of one evaluation.

    Attributes:
      loss: Mean of -log p(target) over all trained tokens; may be NaN.
      num_tokens: Trained tokens.
      runtime_seconds: Wall time.
    """

    loss: float
    num_tokens: int
    runtime_seconds: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that leaves float64."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    def metrics(self) -> dict[str, float]:
        """Returns the values under Hugging Face's names."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_runtime": self.runtime_seconds,
        }


def make_eval_step(loss_function: LossFunction) -> EvalStep:
    """Returns the jitted `(trainable, frozen, batch) -> (Σloss, Σtokens)`."""

    def eval_step(
        trainable: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        def one(micro_batch: Any) -> tuple[Array, Array]:
            return loss_function(trainable, frozen, micro_batch, dropout_key=None)

        losses, tokens = jax.lax.map(one, dict(batch))
        return jnp.sum(losses), jnp.sum(tokens)

    return jax.jit(eval_step)


def evaluate(
    eval_step: EvalStep, trainable: PyTree, frozen: PyTree, loader: Loader
) -> EvalResult:
    """Returns the token-weighted mean loss over one pass of the loader.

    A batch runs on the device while the next one is made; sums are float64.

    Raises:
      DataError: No token of the set carries loss.
    """
    start = time.perf_counter()
    launched = (
        eval_step(trainable, frozen, jax.device_put(dict(loader.batch(step))))
        for step in range(loader.steps_per_epoch)
    )
    loss_sum, num_tokens = 0.0, 0.0
    for pair in _one_behind(launched):
        loss, tokens = jax.device_get(pair)
        loss_sum, num_tokens = loss_sum + float(loss), num_tokens + float(tokens)
    if num_tokens == 0:
        raise DataError(
            "no token of the evaluation set carries loss",
            fix="raise max_length, or set train_on to all",
        )
    return EvalResult(
        loss=loss_sum / num_tokens,
        num_tokens=int(num_tokens),
        runtime_seconds=time.perf_counter() - start,
    )


def _one_behind(
    launched: Iterable[tuple[Array, Array]],
) -> Iterator[tuple[Array, Array]]:
    """Yields each item after its successor was launched, so that the device is busy."""
    previous = None
    for item in launched:
        if previous is not None:
            yield previous
        previous = item
    if previous is not None:
        yield previous
