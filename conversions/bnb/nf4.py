"""4-bit tensors of bitsandbytes <-> NF4Array, codes and scales untouched."""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from conversions.bnb.quant_state import (
    COMPANIONS,
    MARK,
    NESTED_BLOCK,
    QuantState,
    render_quant_state,
)
from conversions.safetensors_header import TensorSpec
from fastjax.errors import ModelError
from fastjax.nn.linear import PackedFormat
from kernels.line import as_lines
from kernels.nf4 import CODEBOOKS, DYNAMIC_MAP, NF4Array

_ABSMAX, _QUANT_MAP, _NESTED_ABSMAX, _NESTED_QUANT_MAP = COMPANIONS
BLOCK = 64
_LONGEST_NUMBER = -2.2250738585072014e-308
_STORAGE = ("uint8", "bfloat16", "float16", "float32")


def read_nf4(
    weight: str, state: QuantState, read: Callable[[str], np.ndarray]
) -> NF4Array:
    """Returns a 4-bit tensor without quantising it again.

    Args:
      weight: Name of the tensor in the file, ending in ".weight".
      state: Its parsed quant_state.
      read: Returns a tensor of the file by name.

    Raises:
      ModelError: Sizes, dtypes or tables disagree, or a scale is not finite.
    """
    out_features, in_features = state.shape
    codes = _codes(weight, state, read(weight))
    _check_table(weight + _QUANT_MAP, read(weight + _QUANT_MAP), CODEBOOKS[state.code])
    absmax = read(weight + _ABSMAX)
    nested = offset = None
    if state.nested_offset is None:
        _check_array(weight + _ABSMAX, absmax, np.dtype(np.float32), state.blocks)
    else:
        _check_array(weight + _ABSMAX, absmax, np.dtype(np.uint8), state.blocks)
        key = weight + _NESTED_QUANT_MAP
        _check_table(key, read(key), DYNAMIC_MAP)
        key = weight + _NESTED_ABSMAX
        groups = -(-state.blocks // NESTED_BLOCK)
        scales = read(key)
        _check_array(key, scales, np.dtype(np.float32), groups)
        nested = _on_device(scales)
        offset = as_lines(state.nested_offset)
    return NF4Array(
        codes=_on_device(codes),
        absmax=_on_device(absmax),
        nested_absmax=nested,
        nested_offset=offset,
        shape=(in_features, out_features),
        dtype=state.dtype,
        code=state.code,
        block_size=state.block_size,
        nested_block_size=NESTED_BLOCK,
        layout="row_major",
    )


def nf4_tensors(weight: str, array: NF4Array) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes would write for an unstacked array.

    Raises:
      ValueError: The array is in an order of the kernels, or stacked.
    """
    if array.layout != "row_major" or array.codes.ndim != 1:
        raise ValueError(
            f"{weight} must be one row_major array; it is {array.layout}, codes of "
            f"shape {array.codes.shape}"
        )
    offset = None
    tensors = {
        weight: np.asarray(array.codes)[:, None],
        weight + _ABSMAX: np.asarray(array.absmax),
        weight + _QUANT_MAP: CODEBOOKS[array.code],
    }
    if array.nested_absmax is not None and array.nested_offset is not None:
        offset = float(array.nested_offset[0])
        tensors[weight + _NESTED_ABSMAX] = np.asarray(array.nested_absmax)
        tensors[weight + _NESTED_QUANT_MAP] = DYNAMIC_MAP
    state = QuantState(
        code=array.code,
        block_size=array.block_size,
        dtype=str(array.dtype),
        shape=array.shape[::-1],
        nested_offset=offset,
    )
    raw = np.frombuffer(render_quant_state(state), np.uint8)
    return tensors | {weight + MARK + array.code: raw}


def nf4_specs(
    weight: str, shape: tuple[int, ...], packed: PackedFormat
) -> dict[str, TensorSpec]:
    """Returns dtypes and shapes of what `padded_nf4_tensors` gives for a matrix.

    Args:
      weight: Name of the tensor in the file, ending in ".weight".
      shape: In Hugging Face's order.
      packed: Its format.
    """
    if packed.code == "int8":
        raise ValueError(f"{weight}: packed.code={packed.code!r} is no 4-bit format")
    blocks = -(-math.prod(shape) // BLOCK)
    small, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    specs = {
        weight: TensorSpec(small, (-(-math.prod(shape) // 2), 1)),
        weight + _ABSMAX: TensorSpec(
            small if packed.double_quant else float32, (blocks,)
        ),
        weight + _QUANT_MAP: TensorSpec(float32, (16,)),
    }
    if packed.double_quant:
        groups = -(-blocks // NESTED_BLOCK)
        specs[weight + _NESTED_ABSMAX] = TensorSpec(float32, (groups,))
        specs[weight + _NESTED_QUANT_MAP] = TensorSpec(float32, (256,))
    state = QuantState(
        code=packed.code,
        block_size=BLOCK,
        dtype=packed.dtype,
        shape=shape,
        nested_offset=_LONGEST_NUMBER if packed.double_quant else None,
    )
    size = len(render_quant_state(state))
    return specs | {weight + MARK + packed.code: TensorSpec(small, (size,))}


def padded_nf4_tensors(
    weight: str, array: NF4Array, specs: Mapping[str, TensorSpec]
) -> dict[str, np.ndarray]:
    """Returns `nf4_tensors` in the sizes of `specs`.

    The JSON of the quant_state ends in blanks: how long its number is shows only when
    the array is there, but files want all sizes before.
    """
    tensors = nf4_tensors(weight, array)
    key = weight + MARK + array.code
    raw = tensors[key].tobytes().ljust(specs[key].nbytes)
    return tensors | {key: np.frombuffer(raw, np.uint8)}


def _codes(weight: str, state: QuantState, stored: np.ndarray) -> np.ndarray:
    """Returns the packed bytes; `bnb_4bit_quant_storage` may call them floats."""
    if stored.dtype.name not in _STORAGE:
        raise ModelError(
            f"4-bit codes are stored as {stored.dtype.name}; known are "
            f"{', '.join(_STORAGE)}",
            where=weight,
        )
    needed = -(-math.prod(state.shape) // 2)
    if stored.nbytes != needed:
        raise ModelError(
            f"{stored.nbytes} bytes of codes; shape {list(state.shape)} needs {needed}",
            where=weight,
        )
    return stored.reshape(-1).view(np.uint8)


def _check_table(key: str, stored: np.ndarray, known: np.ndarray) -> None:
    if stored.dtype != known.dtype or not np.array_equal(stored, known):
        raise ModelError(
            f"the table of {known.size} code values is not the one that bitsandbytes "
            "uses",
            where=key,
        )


def _check_array(key: str, stored: np.ndarray, dtype: np.dtype, size: int) -> None:
    if stored.dtype != dtype or stored.shape != (size,):
        raise ModelError(
            f"{stored.dtype} scales of shape {list(stored.shape)}; {dtype} of shape "
            f"{[size]} are needed",
            where=key,
        )
    bad = 0 if dtype == np.uint8 else np.count_nonzero(~np.isfinite(stored))
    if bad:
        raise ModelError(f"{bad} of {size} scales are NaN or infinite", where=key)


def _on_device(array: np.ndarray) -> jax.Array:
    """Returns a copy, so that no array depends on the file any more."""
    return jax.device_put(array, may_alias=False)
