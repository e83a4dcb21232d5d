"""8-bit linear layers in Hugging Face files, mostly dequantised as they are read.

FP8 in blocks (DeepSeek-V3, arxiv.org/abs/2412.19437 section 3.3; Qwen3-FP8): codes e4m3
and `weight_scale_inv`, a float32 factor for each 128 x 128 block. LLM.int8
(2208.07339): codes int8 and `SCB`, the largest magnitude of each row.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int8

from conversions.hf.checkpoint import Checkpoint
from fastjax.config import DType
from fastjax.errors import ModelError
from kernels.int8 import Int8Array, scaled

BLOCK = 128
_FP8, _INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)
_SCALES = {_FP8: "weight_scale_inv", _INT8: "SCB"}
_FORMAT = "weight_format"


def is_eight_bit(dtype: np.dtype) -> bool:
    """Says whether weights of this dtype come with scales."""
    return dtype in _SCALES


def companions(
    weight: str, dtype: np.dtype, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of what goes with an 8-bit weight.

    Args:
      weight: Name of the tensor, ending in ".weight".
      dtype: An 8-bit one.
      shape: Of the weight, [out, in].
    """
    module = weight.removesuffix("weight")
    if dtype == _FP8:
        blocks = tuple(-(-size // BLOCK) for size in shape)
        return {module + _SCALES[dtype]: blocks}
    return {module + _SCALES[dtype]: shape[:1], module + _FORMAT: ()}


def read_eight_bit(checkpoint: Checkpoint, weight: str) -> Float[Array, "O I"]:
    """Returns an 8-bit weight as float32.

    Raises:
      ModelError: Its scales are not float32 or not finite, or its order is not by row.
    """
    codes, scales = _stored(checkpoint, weight)
    on_device = jax.device_put(codes, may_alias=False)
    if codes.dtype == _FP8:
        return _from_blocks(on_device, jnp.asarray(scales))
    return _from_rows(on_device, jnp.asarray(scales))


def read_int8(checkpoint: Checkpoint, weight: str, *, dtype: DType) -> Int8Array:
    """Returns a weight of LLM.int8 as it is stored; see `read_eight_bit`."""
    codes, scales = _stored(checkpoint, weight)
    return Int8Array(
        codes=_turned(jax.device_put(codes, may_alias=False)),
        absmax=jnp.asarray(scales),
        dtype=dtype,
    )


def is_int8(dtype: np.dtype) -> bool:
    """Says whether weights of this dtype are of LLM.int8."""
    return dtype == _INT8


def _stored(checkpoint: Checkpoint, weight: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of an 8-bit weight and their float32 scales, both checked."""
    codes = checkpoint.read(weight)
    name = weight.removesuffix("weight") + _SCALES[codes.dtype]
    scales = checkpoint.read(name)
    where = f"{checkpoint.folder}, {name}"
    if scales.dtype not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise ModelError(f"scales are {scales.dtype}, not float32", where=where)
    scales = scales.astype(np.float32)
    if not np.isfinite(scales).all():
        raise ModelError("scales are NaN or infinite", where=where)
    if codes.dtype == _INT8:
        order = checkpoint.read(weight.removesuffix("weight") + _FORMAT)
        if int(order) != 0:
            raise ModelError("int8 rows are in an order of old GPUs", where=where)
    return codes, scales


@jax.jit
def _turned(codes: Int8[Array, "O I"]) -> Int8[Array, "I O"]:
    return codes.T


@jax.jit
def _from_blocks(codes: Array, scales: Float[Array, "_ _"]) -> Float[Array, "O I"]:
    rows, columns = codes.shape
    factors = jnp.repeat(jnp.repeat(scales, BLOCK, axis=0), BLOCK, axis=1)
    return codes.astype(jnp.float32) * factors[:rows, :columns]


@jax.jit
def _from_rows(
    codes: Int8[Array, "O I"], scales: Float[Array, " O"]
) -> Float[Array, "O I"]:
    return scaled(codes, scales[:, None])
