"""What a step takes and returns, and what a checkpoint holds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from fastjax.config import DType
from fastjax.train.host_states import with_places
from fastjax.train.optimizer import Optimizer

FIRST_SCALE = 2.0**15
GOOD_STEPS_TO_GROW = 2000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling (1710.03740 section 3.2); stays 1 without float16.

    Attributes:
      scale: Factor of the loss before the backward pass, float32.
      good_steps: Steps without overflow since the scale last changed, int32.
    """

    scale: Any
    good_steps: Any

    @classmethod
    def start(cls, dtype: DType) -> "LossScale":
        """Returns the scale of the first step."""
        scale = FIRST_SCALE if dtype == "float16" else 1.0
        return cls(scale=jnp.float32(scale), good_steps=jnp.int32(0))

    def after(self, is_finite: Bool[Array, ""]) -> "LossScale":
        """Returns the scale of the next step: doubled at times, halved on overflow."""
        good = jnp.where(is_finite, self.good_steps + 1, 0)
        grows = good >= GOOD_STEPS_TO_GROW
        kept = jnp.where(grows, self.scale * 2.0, self.scale)
        halved = jnp.maximum(self.scale / 2.0, 1.0)
        return LossScale(
            scale=jnp.where(is_finite, kept, halved),
            good_steps=jnp.where(grows, 0, good),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes from step to step; its buffers are donated.

    Attributes:
      trainable: Tree of the weights that train.
      opt_state: State of the optimiser.
      step: Steps done, int32.
      loss_scale: Dynamic loss scaling.
    """

    trainable: Any
    opt_state: Any
    step: Any
    loss_scale: LossScale


def init_state(trainable: PyTree, optimizer: Optimizer, dtype: DType) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        step=jnp.int32(0),
        loss_scale=LossScale.start(dtype),
    )


def abstract_state(trainable: PyTree, optimizer: Optimizer, dtype: DType) -> TrainState:
    """Returns the shapes of the state before the first step, and places on the host."""
    make = functools.partial(init_state, optimizer=optimizer, dtype=dtype)
    state = jax.eval_shape(make, trainable)
    if not optimizer.is_offloaded:
        return state
    return dataclasses.replace(state, opt_state=with_places(state.opt_state))


def is_alive(tree: PyTree) -> bool:
    """Whether every array can be read: none was donated, none is of a failed step."""
    leaves = jax.tree.leaves(tree)
    if any(leaf.is_deleted() for leaf in leaves):
        return False
    try:
        jax.block_until_ready(leaves)
    except jax.errors.JaxRuntimeError:
        return False
    return True
