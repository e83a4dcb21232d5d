"""What users say about saving, as the values that it knows."""

from collections.abc import Sequence
from typing import Literal

from fastjax.config import BasePrecision, DType, GGUFKind
from fastjax.errors import ConfigError
from fastjax.flat_config import coerced

SaveMethod = Literal["merged_16bit", "merged_4bit", "lora"]

# Unsloth's names: docs.unsloth.ai, "Saving to GGUF".
_METHODS = {"merged_4bit_forced": "merged_4bit"}
_KINDS = {"quantized": "q4_k_m", "fast_quantized": "q8_0"}
_UNQUANTISED = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def save_method_of(name: str) -> SaveMethod:
    """Returns the way of saving; raises `ConfigError` if there is none such."""
    return coerced("save_method", _METHODS.get(name, name), SaveMethod)


def base_precision_of(name: str) -> BasePrecision:
    """Returns what is merged onto; raises `ConfigError` if there is none such."""
    return coerced("base_precision", name, BasePrecision)


def dtype_of(name: str) -> DType:
    """Returns a dtype of weights; raises `ConfigError` if there is none such."""
    return coerced("dtype", name, DType)


def gguf_kind_of(name: str | Sequence[str], dtype: DType) -> GGUFKind:
    """Returns a kind of GGUF matrices; raises `ConfigError` if there is none such.

    Args:
      name: A list holds one: each kind is a folder of its own.
      dtype: Of matrices that are not quantised.
    """
    if isinstance(name, list | tuple) and len(name) == 1:
        (name,) = name
    if not isinstance(name, str):
        raise ConfigError(
            f"quantization_method names {len(name)} kinds, and a folder holds one",
            fix="call it once for each, with a folder for each",
        )
    names = _KINDS | {"not_quantized": _UNQUANTISED[dtype]}
    return coerced("quantization_method", names.get(name, name), GGUFKind)
