"""Learning-rate schedules, with the values of transformers at every step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fastjax.config import OptimizerConfig

MIN_LR_SHARE = 0.1
"""Where "cosine_with_min_lr" ends, as a share of the peak."""


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Returns the steps of rising rate; a share is rounded up to whole steps.

    A share leaves at least one step at the peak: the rate of a run of one step would
    otherwise be 0.
    """
    if config.warmup_steps < 1:
        rising = math.ceil(config.warmup_steps * total_steps)
        return min(rising, max(0, total_steps - 1))
    return int(config.warmup_steps)


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a pure function of the step, counted from 0.

    The warmup rises from 0 at step 0 to the peak at step `warmup_steps`; "constant"
    has none. "linear" and "cosine" reach 0 at `total_steps`.

    Args:
      config: Peak rate, type and warmup.
      total_steps: Optimiser steps of the whole run.
    """
    peak, warmup = config.learning_rate, warmup_steps(config, total_steps)
    if config.lr_scheduler_type == "constant":
        return lambda count: jnp.full(jnp.shape(count), peak, jnp.float32)
    decay = _DECAYS[config.lr_scheduler_type]

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(count, jnp.float32)
        rising = step / max(1, warmup)
        done = (step - warmup) / max(1, total_steps - warmup)
        falling = decay(jnp.clip(done, 0.0, 1.0))
        return peak * jnp.where(step < warmup, rising, falling)

    return schedule


def _linear(done: Float[Array, ""]) -> Float[Array, ""]:
    return 1.0 - done


def _cosine(done: Float[Array, ""]) -> Float[Array, ""]:
    return 0.5 * (1.0 + jnp.cos(math.pi * done))


def _cosine_with_min_lr(done: Float[Array, ""]) -> Float[Array, ""]:
    return MIN_LR_SHARE + (1.0 - MIN_LR_SHARE) * _cosine(done)


_DECAYS: dict[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "constant_with_warmup": jnp.ones_like,
}
