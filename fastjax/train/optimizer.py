"""Optimisers: gradients become a direction, a schedule says how far to go along it."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from fastjax.config import OptimizerConfig, Table
from fastjax.train.adam8bit import scale_by_adam8bit
from fastjax.train.host_states import chosen, in_host_memory
from fastjax.train.schedule import make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """An Optax chain without a learning rate, and the learning rate.

    They stay apart so that the rate is a function of the step alone: a skipped update
    leaves the chain's state as it was, and the schedule still ends in time.

    Attributes:
      transform: Clips, scales and adds weight decay; its result is subtracted.
      schedule: Learning rate of a step.
      table_factor: Of that rate for embeddings and output head.
      is_offloaded: Its states wait in host memory, and the transform itself leaves out
        an update that is not finite.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    table_factor: float | Float[Array, ""] = 1.0
    is_offloaded: bool = False

    def init(self, trainable: PyTree) -> PyTree:
        """Returns the state before the first step, in float32 or 8 bits."""
        return self.transform.init(as_float32(trainable))

    def update(
        self,
        gradients: PyTree,
        opt_state: PyTree,
        trainable: PyTree,
        step: Int[Array, ""],
        *,
        is_finite: Bool[Array, ""] | bool = True,
    ) -> tuple[PyTree, PyTree]:
        """Returns the trainable tree and the optimiser's state after one step.

        Both are as they were where the step is not finite.

        Args:
          gradients: Of the mean loss, float32.
          opt_state: From `init` or the step before.
          trainable: Any float dtype; the sum is taken in float32.
          step: Steps done so far.
          is_finite: Of loss and gradients.
        """
        weights = as_float32(trainable)
        # Optax raises floats to integer counts, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            direction, new_state = optax.with_extra_args_support(self.transform).update(
                gradients, opt_state, weights, is_finite=is_finite
            )
        rate = self.schedule(step)

        def moved(
            path: jax.tree_util.KeyPath,
            old: Float[Array, "..."],
            along: Float[Array, "..."],
        ) -> Float[Array, "..."]:
            own = rate * self.table_factor if _is_of_table(path) else rate
            return (old.astype(jnp.float32) - own * along).astype(old.dtype)

        new = jax.tree.map_with_path(moved, trainable, direction)
        if not self.is_offloaded:
            new_state = chosen(is_finite, new_state, opt_state)
        return chosen(is_finite, new, trainable), new_state


def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """Returns the optimiser and schedule that the config names.

    "adamw" computes what torch.optim.AdamW does (1711.05101), with weight decay on
    every trained weight; "adamw_8bit" keeps its moments in 8 bits, as bitsandbytes
    does. "adafactor" (1804.04235) is used with an explicit rate and
    no parameter scaling; its second moments are factored over the two largest sides
    of an array where both have at least 128 elements. "lion" is 2302.06675, "sgd" has
    no momentum.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    decay = optax.add_decayed_weights(config.weight_decay)
    parts = _scaling(config)
    parts += [decay] if config.weight_decay > 0 else []
    if config.offload_optimizer:
        parts = [in_host_memory(optax.chain(*parts))]
    parts = [clip, *parts] if config.max_grad_norm > 0 else parts
    own_rate = config.embedding_learning_rate or config.learning_rate
    return Optimizer(
        transform=optax.chain(*parts),
        schedule=make_schedule(config, total_steps),
        table_factor=own_rate / config.learning_rate,
        is_offloaded=config.offload_optimizer,
    )


def as_float32(tree: PyTree) -> PyTree:
    """Returns the tree with every array in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _is_of_table(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf belongs to the module that its path starts with: a table's."""
    return bool(path) and getattr(path[0], "key", None) in get_args(Table)


def _scaling(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    b1, b2 = config.adam_beta1, config.adam_beta2
    match config.optim:
        case "adamw":
            return [optax.scale_by_adam(b1=b1, b2=b2, eps=config.adam_epsilon)]
        case "adamw_8bit":
            return [scale_by_adam8bit(b1=b1, b2=b2, eps=config.adam_epsilon)]
        case "lion":
            return [optax.scale_by_lion(b1=b1, b2=b2)]
        case "adafactor":
            return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
        case "sgd":
            return [optax.identity()]
