"""Which weights are 4-bit, and in which format."""

from fastjax.models.build import Weights
from fastjax.nn.linear import PackedFormat
from kernels.nf4 import NF4Array


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
