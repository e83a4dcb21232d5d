"""The header of a safetensors file: names, dtypes, shapes and places of tensors.

Format: github.com/huggingface/safetensors, README; eight bytes of length, that many
bytes of JSON, then the tensors back to back. Stricter than the format where a
difference could hide damage or an attack.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from conversions.strict_json import parse_json_object
from fastjax.errors import ModelError, printable

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 2**31 - 1
MAX_RANK = 8

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor, and its place after the header in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(
    raw: bytes, *, data_bytes: int, where: str
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Returns the tensors of a file by name, in the order of their places, and notes.

    Args:
      raw: The JSON after the length.
      data_bytes: Bytes of the file after the header.
      where: The file, for errors.

    Raises:
      ModelError: The header is broken, or does not describe exactly `data_bytes`.
    """
    entries = parse_json_object(raw, where=where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ModelError("__metadata__ must map names to strings", where=where)
    specs = {name: _spec(name, entry, where) for name, entry in entries.items()}
    ordered = sorted(specs.items(), key=lambda item: (item[1].begin, item[1].nbytes))
    end = 0
    for name, spec in ordered:
        if spec.begin != end:
            kind = "overlaps" if spec.begin < end else "leaves a hole after"
            raise ModelError(
                f"tensor {printable(name)} {kind} the tensor before it", where=where
            )
        end += spec.nbytes
    _check_size(end, data_bytes, header_bytes=LENGTH_BYTES + len(raw), where=where)
    return dict(ordered), metadata


def render_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Returns length and header, and the place of each tensor in the file.

    Tensors lie as the safetensors library puts them: large dtypes first, then by
    name; the header is padded with spaces to a multiple of eight bytes.

    Args:
      specs: Dtype and shape of each tensor; `begin` is not used.
      metadata: Notes beside the `format` that transformers wants.
    """
    ordered = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places, end = {}, 0
    for name in ordered:
        spec = specs[name]
        places[name] = end
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8")
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    start = LENGTH_BYTES + len(raw)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw, {
        name: start + place for name, place in places.items()
    }


def _spec(name: str, entry: Any, where: str) -> TensorSpec:
    shown = printable(name)
    if not name or not name.isprintable() or any(bad in name for bad in "/\\"):
        raise ModelError(
            f"unknown tensor name {shown}: it looks like a path or holds control "
            "characters",
            where=where,
            fix="do not trust this file; download the model from its author",
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(
            f"tensor {shown} must have dtype, shape and data_offsets", where=where
        )
    dtype = _dtype(shown, entry["dtype"], where)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not _is_sizes(shape)
        or len(shape) > MAX_RANK
        or max(shape, default=0) > (MAX_DIMENSION)
    ):
        raise ModelError(
            f"tensor {shown} has shape {printable(shape)}; sizes must be integers in "
            f"[0, 2**31), at most {MAX_RANK} of them",
            where=where,
        )
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ModelError(
            f"tensor {shown} has data_offsets {printable(offsets)}; two integers "
            "are needed",
            where=where,
        )
    spec = TensorSpec(dtype, tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise ModelError(
            f"tensor {shown} has {offsets[1] - offsets[0]} bytes; shape {shape} of "
            f"{entry['dtype']} needs {spec.nbytes}",
            where=where,
        )
    return spec


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _dtype(shown: str, name: Any, where: str) -> np.dtype:
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    if isinstance(name, str) and name.startswith(("F8", "F4", "F6")):
        raise ModelError(
            f"tensor {shown} is stored in {printable(name)}: of the FP8 and FP4 kinds "
            "only F8_E4M3 is read",
            where=where,
            fix="use the BF16 version of this model",
        )
    raise ModelError(
        f"tensor {shown} has dtype {printable(name)}; known are {', '.join(DTYPES)}",
        where=where,
    )


def _check_size(end: int, found: int, *, header_bytes: int, where: str) -> None:
    if end == found:
        return
    sizes = f"{header_bytes + end} bytes are expected, it has {header_bytes + found}"
    if end > found:
        raise ModelError(
            f"the file is truncated: {sizes}",
            where=where,
            fix="delete it and download it again",
        )
    raise ModelError(f"bytes follow the last tensor: {sizes}", where=where)
