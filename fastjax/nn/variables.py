"""Variable types: what trains is an `nnx.Param`, what does not is `Frozen`."""

import jax
import jax.numpy as jnp
from flax import nnx


class Frozen(nnx.Variable):
    """A weight, table or factor that no optimiser sees."""


class LoRAParam(nnx.Param):
    """A weight of an adapter."""


def variable(value: object, *, is_trainable: bool) -> nnx.Variable:
    """Returns the value in the variable type that says whether it trains."""
    return nnx.Param(value) if is_trainable else Frozen(value)


def abstract(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array that does not exist yet."""
    return jax.ShapeDtypeStruct(shape, dtype)
