"""Float32 arithmetic with the roundings of the format, whatever the compiler fuses.

XLA lets LLVM contract `a * b + c` to a fused multiply-add, on CPUs and GPUs alike, and
may divide approximately on GPUs. Either moves the last bit, so that codes and scales
would differ from those in bitsandbytes' files.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_LANES = 8
_ACCUMULATORS = 4
_RUN = 16


def product(a: Float32[Array, "*S"], b: Float32[Array, "*S"]) -> Float32[Array, "*S"]:
    """Returns `a * b` rounded to float32, even where a sum consumes it.

    The barrier keeps the multiplication in a kernel of its own. A `reduce_precision`
    to float32 would not do: XLA removes it as the identity.
    """
    return jax.lax.optimization_barrier(a * b)


def quotient(a: Float32[Array, "*S"], b: Float32[Array, "*S"]) -> Float32[Array, "*S"]:
    """Returns `a / b` rounded once."""
    estimate = a / b
    # Dekker, 1971: products of 12-bit halves are exact, with or without contraction.
    whole = product(estimate, b)
    (q_high, q_low), (b_high, b_low) = _halves(estimate), _halves(b)
    rest = (q_high * b_high - whole) + q_high * b_low + q_low * b_high + q_low * b_low
    corrected = estimate + ((a - whole) - rest) / b
    # The halves of tiny numbers are subnormal, which XLA flushes to zero.
    return jnp.where(b > 2.0**-100, corrected, estimate)


def mean(x: Float32[Array, " M"]) -> Float32[Array, ""]:
    """Returns the mean in the order of PyTorch's vectorised CPU sum.

    Eight lanes, four accumulators each, rows added in runs of 16, then runs of runs;
    the elements after the last whole lane first. ATen's SumKernel.cpp, one thread.
    """
    vectors = x.size // _LANES
    rows = vectors // _ACCUMULATORS
    main = x[: rows * _ACCUMULATORS * _LANES].reshape(rows, _ACCUMULATORS, _LANES)
    sums = _cascade(main)
    left = x[main.size : vectors * _LANES].reshape(-1, _LANES)
    lanes = _in_order([sums[0], *left, *sums[1:]])
    total = _in_order([jnp.zeros_like(x, shape=()), *x[vectors * _LANES :], *lanes])
    return quotient(total, jnp.full_like(total, x.size))


def _cascade(rows: jax.Array) -> jax.Array:
    """Sums over the first axis, runs of 16 at a time."""
    while rows.shape[0] > 1:
        rows = jnp.pad(rows, ((0, -rows.shape[0] % _RUN), (0, 0), (0, 0)))
        runs = rows.reshape(-1, _RUN, *rows.shape[1:])
        rows = _in_order([runs[:, i] for i in range(_RUN)])
    return rows.sum(axis=0)  # one row, or none


def _in_order(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits a float32 number into its upper 12 bits and the rest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
