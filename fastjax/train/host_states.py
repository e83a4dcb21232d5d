"""Optimiser states that wait in host memory and visit the device a piece at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from kernels.adam8bit import BLOCK_SIZE

_LEAST_BYTES = 2**16
"""Smaller arrays stay on the device: a copy takes as long as a kernel."""

PIECE_BYTES = 2**28
"""Of a float32 array, at most; its states come and go in such pieces."""

_MOST_PIECES = 8  # times as many as these bytes ask for


def in_host_memory(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` for each array on its own, with large states in pinned memory.

    A piece's states come to the device when the piece before it has its update, and go
    back changed. `is_finite` says whether they do change.

    Args:
      inner: Treats every element alike, or every block of 256, whatever the shape: it
        must not clip by a norm.
    """

    def init(params: PyTree) -> tuple[Any, ...]:
        return tuple(
            _sent(jax.vmap(lambda piece: inner.init([piece]))(_pieces(leaf)))
            for leaf in jax.tree.leaves(params)
        )

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
                gradient, waiting, directions[-1] = jax.lax.optimization_barrier(
                    (gradient, waiting, directions[-1])
                )

            direction, moved = _updated(inner, gradient, waiting, weight, is_finite)
            directions.append(direction)
            states.append(moved)
        return structure.unflatten(directions), tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _updated(
    inner: optax.GradientTransformation,
    gradient: Float[Array, "..."],
    waiting: PyTree,
    weight: Float[Array, "..."],
    is_finite: Bool[Array, ""] | bool,
) -> tuple[Float[Array, "..."], PyTree]:
    """Returns an array's update and its states, on the host where they were there."""
    pieces, weights, is_large = _pieces(gradient), _pieces(weight), _are_large(waiting)

    def visit(index: Int[Array, ""], carry: Any) -> Any:
        def piece(stack: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

        rest, waiting = carry
        held = jax.tree.map(piece, waiting)
        held = _moved(held, is_large, jax.memory.Space.Device)
        found, new = inner.update([piece(rest)], held, [piece(weights)])
        new = chosen(is_finite, new, held)
        new = _moved(new, is_large, jax.memory.Space.Host)
        return jax.tree.map(
            lambda stack, own: jax.lax.dynamic_update_index_in_dim(
                stack, own, index, 0
            ),
            carry,
            (jax.tree.leaves(found)[0], new),
        )

    # A loop that fills what it reads: the host holds no state twice, nor the device.
    direction, moved = jax.lax.fori_loop(0, pieces.shape[0], visit, (pieces, waiting))
    return direction.reshape(gradient.shape), moved


def chosen(condition: Bool[Array, ""] | bool, new: PyTree, old: PyTree) -> PyTree:
    """Returns the new arrays where the condition holds, else the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def with_places(states: PyTree) -> PyTree:
    """Returns the shapes of states from `in_host_memory`, with the places they have."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("device",), auto, devices=jax.local_devices()[:1])
    # Other shardings of one device do not tell a traced program where an array is.
    host = jax.NamedSharding(mesh, jax.P(), memory_kind="pinned_host")

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


def _pieces(array: Float[Array, "..."]) -> Float[Array, "P Q"]:
    """Returns the array's elements in pieces of equal size, all in one if none fit."""
    least = max(1, -(-4 * array.size // PIECE_BYTES))
    counts = range(least, _MOST_PIECES * least)
    # Blocks of 8 bits are then those of the array, and rows may be of any number.
    whole = (n for n in counts if array.size % (n * BLOCK_SIZE) == 0)
    return array.reshape(next(whole, 1), -1)


def _sent(state: PyTree) -> PyTree:
    return _moved(state, _are_large(state), jax.memory.Space.Host)


def _moved(state: PyTree, is_large: PyTree, space: Any) -> PyTree:
    def moved(leaf: Array, moves: bool) -> Array:
        return jax.device_put(leaf, space) if moves else leaf

    return jax.tree.map(moved, state, is_large)


def _are_large(state: PyTree) -> PyTree:
    return jax.tree.map(_is_large, state)


def _is_large(leaf: Any) -> bool:
    return _bytes(leaf) >= _LEAST_BYTES


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
