"""Which weights are packed, in which format, and the way there and back."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
from jaxtyping import Array, Float

from fastjax.config import DType, QuantConfig
from fastjax.models.build import Weights
from fastjax.nn.linear import PackedFormat
from kernels.nf4 import NF4Array
from kernels.packed import PackedArray, dense


def wanted_format(quant: QuantConfig | None, dtype: DType) -> PackedFormat | None:
    """Returns the format that linears of 16 bits are given; None keeps them."""
    if quant is None or not quant.is_packed:
        return None
    return PackedFormat(
        code="int8" if quant.load_in_8bit else quant.bnb_4bit_quant_type,
        double_quant=quant.bnb_4bit_use_double_quant and not quant.load_in_8bit,
        dtype=dtype,
    )


def packed_formats(weights: Weights) -> dict[str, PackedFormat]:
    """Returns the format of each packed linear, by canonical module name.

    A checkpoint decides per tensor what is packed, so that dynamic 4-bit ones keep
    the layers that their makers left in 16 bits.
    """
    return {
        name.removesuffix(".weight"): _format_of(value)
        for name, value in weights.items()
        if isinstance(value, PackedArray)
    }


def packed_weights(
    weights: Iterable[tuple[str, Array | PackedArray]],
    formats: Mapping[str, PackedFormat],
) -> Iterator[tuple[str, Array | PackedArray]]:
    """Yields the weights, those of `formats` in 4 bits; what has 4 bits stays so.

    Args:
      weights: Canonical names and arrays.
      formats: Format of the linears that become 4-bit, by canonical module name.
    """
    for name, value in weights:
        packed = formats.get(name.removesuffix(".weight"))
        if packed is None or isinstance(value, NF4Array):
            yield name, value
        else:
            yield name, _packed(dense(value), packed=packed)


def dense_weights(
    weights: Iterable[tuple[str, Array | PackedArray]],
) -> Iterator[tuple[str, Array]]:
    """Yields the weights, packed ones dequantised."""
    for name, value in weights:
        yield name, dense(value)


def _format_of(value: PackedArray) -> PackedFormat:
    if isinstance(value, NF4Array):
        has_nested = value.nested_absmax is not None
        return PackedFormat(code=value.code, double_quant=has_nested, dtype=value.dtype)
    return PackedFormat(code="int8", double_quant=False, dtype=value.dtype)


@functools.partial(jax.jit, static_argnames=("packed",))
def _packed(weight: Float[Array, "I O"], *, packed: PackedFormat) -> PackedArray:
    return packed.pack(weight)
