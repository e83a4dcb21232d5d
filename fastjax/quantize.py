"""Which weights are 4-bit, in which format, and the way there and back."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
from jaxtyping import Array, Float

from fastjax.models.build import Weights
from fastjax.nn.linear import PackedFormat
from kernels.nf4 import NF4Array, dequantize


def packed_formats(weights: Weights) -> dict[str, PackedFormat]:
    """Returns the 4-bit format of each packed linear, by canonical module name.

    A checkpoint decides per tensor what is packed, so that dynamic 4-bit ones keep
    the layers that their makers left in 16 bits.
    """
    return {
        name.removesuffix(".weight"): PackedFormat(
            code=value.code,
            double_quant=value.nested_absmax is not None,
            dtype=value.dtype,
        )
        for name, value in weights.items()
        if isinstance(value, NF4Array)
    }


def packed_weights(
    weights: Iterable[tuple[str, Array | NF4Array]], formats: Mapping[str, PackedFormat]
) -> Iterator[tuple[str, Array | NF4Array]]:
    """Yields the weights, those of `formats` in 4 bits; what is packed stays so.

    Args:
      weights: Canonical names and arrays.
      formats: Format of the linears that become 4-bit, by canonical module name.
    """
    for name, value in weights:
        packed = formats.get(name.removesuffix(".weight"))
        if packed is None or isinstance(value, NF4Array):
            yield name, value
        else:
            yield name, _packed(value, packed=packed)


def dense_weights(
    weights: Iterable[tuple[str, Array | NF4Array]],
) -> Iterator[tuple[str, Array]]:
    """Yields the weights, 4-bit ones dequantised."""
    for name, value in weights:
        yield name, dequantize(value) if isinstance(value, NF4Array) else value


@functools.partial(jax.jit, static_argnames=("packed",))
def _packed(weight: Float[Array, "I O"], *, packed: PackedFormat) -> NF4Array:
    return packed.pack(weight)
