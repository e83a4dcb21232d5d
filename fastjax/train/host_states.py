"""Optimiser states that wait in host memory and visit the device an array at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

_LEAST_BYTES = 2**16
"""Smaller arrays stay on the device: a copy takes as long as a kernel."""


def in_host_memory(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` for each array on its own, with large states in pinned memory.

    A state comes to the device when the array before it has its update, and goes back
    changed. `is_finite` says whether it does change.

    Args:
      inner: Treats every array alike and knows of no other: it must not clip by the
        norm of all.
    """

    def init(params: PyTree) -> tuple[Any, ...]:
        return tuple(_sent(inner.init([leaf])) for leaf in jax.tree.leaves(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        is_finite: Bool[Array, ""] | bool = True,
        **_: Any,
    ) -> tuple[PyTree, Any]:
        gradients, structure = jax.tree.flatten(updates)
        weights = structure.flatten_up_to(params)
        directions: list[Array] = []
        states: list[Any] = []
        for gradient, weight, waiting in zip(gradients, weights, state, strict=True):
            if directions:
                # One after the other, or all states would be on the device at once.
                gradient, directions[-1] = jax.lax.optimization_barrier(
                    (gradient, directions[-1])
                )
            held = jax.tree.map(_fetched, waiting)
            found, moved = inner.update([gradient], held, [weight])
            directions.extend(jax.tree.leaves(found))
            states.append(_sent(chosen(is_finite, moved, held)))
        return structure.unflatten(directions), tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def chosen(condition: Bool[Array, ""] | bool, new: PyTree, old: PyTree) -> PyTree:
    """Returns the new arrays where the condition holds, else the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def with_places(states: PyTree) -> PyTree:
    """Returns the shapes of states from `in_host_memory`, with the places they have."""
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_large(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    return jax.tree.map(placed, states)


def bytes_by_place(states: PyTree) -> tuple[int, int]:
    """Returns the bytes of such states on the device, and in host memory."""
    sizes = [(_bytes(leaf), _is_large(leaf)) for leaf in jax.tree.leaves(states)]
    waiting = sum(size for size, is_large in sizes if is_large)
    return sum(size for size, _ in sizes) - waiting, waiting


def _sent(state: PyTree) -> PyTree:
    def sent(leaf: Array) -> Array:
        return jax.device_put(leaf, jax.memory.Space.Host) if _is_large(leaf) else leaf

    return jax.tree.map(sent, state)


def _fetched(leaf: Array) -> Array:
    return jax.device_put(leaf, jax.memory.Space.Device) if _is_large(leaf) else leaf


def _is_large(leaf: Any) -> bool:
    return _bytes(leaf) >= _LEAST_BYTES


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
