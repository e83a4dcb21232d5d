"""Numbers of stacked layers, each of which fills a line of memory.

XLA hands a kernel part of a stack where it lies if that part is whole lines of 256
bytes. Any other part it copies first, and a launch takes microseconds, however little
it copies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

NUMBERS_A_LINE = 64


def as_lines(numbers: jax.typing.ArrayLike) -> Float32[Array, "*L line"]:
    """Returns each number, in float32, as often as a line has room for it."""
    values = jnp.asarray(numbers, jnp.float32)[..., None]
    return jnp.broadcast_to(values, (*values.shape[:-1], NUMBERS_A_LINE))
