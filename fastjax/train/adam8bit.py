"""Adam with block-wise 8-bit states as an Optax transformation."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from kernels.adam8bit import Blocks, adam8bit

MIN_ELEMENTS = 4096
"""Smaller arrays keep float32 states, as in bitsandbytes: they would save nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam8bitState:
    """What stays from step to step: 2.03 bytes an element.

    Attributes:
      count: Updates done, int32.
      mu: `Blocks` of each array: its first moment.
      nu: Its second moment.
    """

    count: Any
    mu: Any
    nu: Any


def scale_by_adam8bit(
    *, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` whose moments are 8-bit codes between the steps.

    The arithmetic is float32, as the updates must be. Blocks of 256 run over an array
    in row-major order (2110.02861); arrays below `MIN_ELEMENTS` stay in float32.
    """
    groups: dict[Hashable, optax.GradientTransformation] = {
        "8bit": _scale_all(b1=b1, b2=b2, eps=eps),
        "float32": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(groups, lambda tree: jax.tree.map(_group, tree))


def _group(array: Array) -> str:
    return "8bit" if array.size >= MIN_ELEMENTS else "float32"


def _scale_all(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params: PyTree) -> Any:
        mu, nu = (
            jax.tree.map(lambda x: Blocks.zeros(x.size), params) for _ in range(2)
        )
        return Adam8bitState(count=jnp.int32(0), mu=mu, nu=nu)

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, Any]:
        del params
        count = state.count + jnp.int32(1)
        gradients, structure = jax.tree.flatten(updates)
        mus = structure.flatten_up_to(state.mu)
        nus = structure.flatten_up_to(state.nu)
        results = [
            adam8bit(gradient, mu, nu, count, b1=b1, b2=b2, eps=eps)
            for gradient, mu, nu in zip(gradients, mus, nus, strict=True)
        ]
        direction, mu, nu = ([r[i] for r in results] for i in range(3))
        return structure.unflatten(direction), Adam8bitState(
            count=count, mu=structure.unflatten(mu), nu=structure.unflatten(nu)
        )

    return optax.GradientTransformation(init, update)
