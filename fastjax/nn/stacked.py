"""Runs layers that are stacked: scanned, or written out in the program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fastjax.nn.feed_forward import hand_back
from fastjax.nn.variables import LoRAParam
from fastjax.remat import RematPlan, rematerialised
from kernels.line import NUMBERS_A_LINE


def planned(
    layer: Callable[..., Any],
    x: Array,
    inputs: Any,
    stacks: Any,
    *,
    remat: RematPlan,
    layers: range,
) -> Array:
    """Returns `x` after the layers of a segment, each under its policy.

    Args:
      layer: Takes its policy, then what `scanned` gives it.
      x: Hidden states before them.
      inputs: What of the layers trains, stacked.
      stacks: All else of them.
      remat: Of the whole decoder.
      layers: Places in the decoder.
    """
    for run, policy in remat.groups(layers):
        own = range(run.start - layers.start, run.stop - layers.start)
        body = functools.partial(layer, policy)
        if remat.writes_out(policy):
            # One function for all, so that it is traced and lowered once.
            kept = jax.jit(
                rematerialised(
                    body, policy, is_scanned=False, own_barrier=_own_barrier(inputs)
                )
            )
            parts = _unstacked(inputs, own)
            for index, part in zip(own, parts, strict=True):
                x = kept(jnp.int32(index), x, part, stacks)
            continue
        kept = rematerialised(body, policy)
        if policy == "offload":
            start = (x, jnp.zeros_like(x))
            x = hand_back(*scanned(kept, start, inputs, stacks, layers=own))
        else:
            x = scanned(kept, x, inputs, stacks, layers=own)
    return x


def _unstacked(inputs: Any, layers: range) -> list[Any]:
    """Returns each layer's part of the inputs.

    By a split, whose gradient joins those of the layers; that of indexing would add up
    as many zero-filled stacks, in one kernel that takes XLA half a minute to compile.
    """
    leaves, tree = jax.tree.flatten(inputs)
    part = slice(layers.start, layers.stop)
    split = [jax.lax.split(leaf[part], [1] * len(layers)) for leaf in leaves]
    return [
        jax.tree.unflatten(tree, [jnp.squeeze(leaf, 0) for leaf in own])
        for own in zip(*split, strict=True)
    ]


def _own_barrier(inputs: tuple[Any, Any]) -> tuple[Any, bool]:
    """Returns False for adapters, True for other weights and for the keys of dropout.

    Both passes read adapters where they lie in their stacks; the second one would read
    a copy behind a barrier. Without one, masks and 16-bit copies of whole weights would
    stay from the first pass on.
    """
    trained, _ = inputs
    barrier = jax.tree.map(
        lambda weight: not isinstance(weight, LoRAParam),
        trained,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return barrier, True


def scanned(
    layer: Callable[[Any, Any, Any, Any], Any],
    x: Any,
    inputs: Any,
    stacks: Any,
    *,
    layers: range,
) -> Any:
    """Returns `x` after consecutive layers, each with its part of the inputs.

    Args:
      layer: Takes its place, `x`, its part of the inputs, and the stacks.
      x: Hidden states before them, or a tree of such.
      inputs: Stacks that each turn of the scan gets a part of.
      stacks: Given to each turn whole.
      layers: Places in the stacks.
    """

    def body(hidden: Any, item: tuple[Array, Any]) -> tuple[Any, None]:
        index, own = item
        return layer(index, hidden, own, stacks), None

    part = slice(layers.start, layers.stop)
    own = jax.tree.map(lambda leaf: leaf[part], inputs)
    # A constant, not an iota: from it XLA knows which part of a stack each turn reads,
    # and lets the kernels read it there. NumPy's own the backward pass would not share.
    indices = jnp.asarray(np.arange(part.start, part.stop, dtype=np.int32))
    return jax.lax.scan(body, x, (indices, own))[0]


def layer_of(index: Any, stack: Array) -> Array:
    """Returns one layer of a stack; the index is in bounds."""
    return jax.lax.dynamic_index_in_dim(
        stack, index, keepdims=False, allow_negative_indices=False
    )


def summed_layer_of(index: Any, stack: Array) -> Array:
    """Does as `layer_of`, and picks a number a layer, or a line of it, by a sum.

    XLA would copy it on the stream that takes activations to the host, and the layer
    would wait for these.
    """
    if stack.shape[1:] not in ((), (NUMBERS_A_LINE,)):
        return layer_of(index, stack)
    layers = jnp.arange(stack.shape[0]).reshape(-1, *(1,) * (stack.ndim - 1))
    own = jnp.where(layers == index, stack, jnp.zeros_like(stack))
    return jnp.sum(own, axis=0, dtype=stack.dtype)
