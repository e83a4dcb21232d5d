"""The JSON beside every 4-bit tensor of bitsandbytes, and the keys around it."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any, Literal, cast

from conversions.strict_json import parse_json_object
from fastjax.errors import ModelError, printable

MARK = ".quant_state.bitsandbytes__"
COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
NESTED_BLOCK = 256

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("bfloat16", "float16", "float32")
_CODES = ("nf4", "fp4")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantState:
    """What bitsandbytes notes about one 4-bit tensor.

    Attributes:
      code: Which 16 numbers the codes stand for.
      block_size: Elements that share a scale.
      dtype: Of the dequantised values.
      shape: Shape in Hugging Face's order.
      nested_offset: Mean of the scales that are quantised in turn; None when they
        are float32.
    """

    code: Literal["nf4", "fp4"]
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-math.prod(self.shape) // self.block_size)


def quantised_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the 4-bit tensors of a checkpoint: weight name to quant_state key."""
    found: dict[str, str] = {}
    for key in names:
        weight, mark, _ = key.partition(MARK)
        if not mark:
            continue
        if weight in found:
            raise ModelError("two quant_state keys for one tensor", where=weight)
        found[weight] = key
    return found


def companion_keys(weight: str, state: QuantState) -> tuple[str, ...]:
    """Returns the keys that go with a 4-bit tensor besides weight and state."""
    used = COMPANIONS[:2] if state.nested_offset is None else COMPANIONS
    return tuple(weight + key for key in used)


def parse_quant_state(raw: bytes, *, key: str) -> QuantState:
    """Returns the checked content of a quant_state tensor.

    Raises:
      ModelError: Names the field, its value and what is allowed.
    """
    values = parse_json_object(raw, where=key)

    def field(name: str, is_good: bool, rule: str) -> Any:
        value = values.get(name)
        if not is_good:
            shown = printable(repr(value))
            raise ModelError(f"{name}={shown} must be {rule}", where=key)
        return value

    code, size = values.get("quant_type"), values.get("blocksize")
    is_code = code in _CODES and key.endswith(MARK + str(code))
    field("quant_type", is_code, f"one of: {', '.join(_CODES)}, and agree with the key")
    is_size = type(size) is int and size in _BLOCK_SIZES
    field("blocksize", is_size, f"one of: {', '.join(map(str, _BLOCK_SIZES))}")
    dtype = str(values.get("dtype")).removeprefix("torch.")
    field("dtype", dtype in _DTYPES, f"one of: {', '.join(_DTYPES)}")
    shape = values.get("shape")
    field("shape", _is_matrix(shape), "two positive integers")
    offset = None
    if any(name.startswith("nested_") for name in values):
        nested = values.get("nested_blocksize")
        field("nested_blocksize", nested == NESTED_BLOCK, str(NESTED_BLOCK))
        is_float = values.get("nested_dtype") in ("float32", "torch.float32")
        field("nested_dtype", is_float, "float32")
        offset = values.get("nested_offset")
        is_finite = type(offset) is float and math.isfinite(offset)
        field("nested_offset", is_finite, "a finite number")
    return QuantState(
        code=cast(Literal["nf4", "fp4"], code),
        block_size=cast(int, size),
        dtype=dtype,
        shape=tuple(cast(list, shape)),
        nested_offset=offset,
    )


def _is_matrix(shape: Any) -> bool:
    is_pair = isinstance(shape, list) and len(shape) == 2
    return is_pair and all(type(n) is int and 0 < n < 2**31 for n in shape)


def render_quant_state(state: QuantState) -> bytes:
    """Returns the JSON as bitsandbytes writes it."""
    values: dict[str, Any] = {
        "quant_type": state.code,
        "blocksize": state.block_size,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    if state.nested_offset is not None:
        values["nested_blocksize"] = NESTED_BLOCK
        values["nested_dtype"] = "float32"
        values["nested_offset"] = state.nested_offset
    return json.dumps(values).encode("utf-8")
