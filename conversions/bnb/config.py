"""The part of config.json that tells loaders how to read 4-bit weights."""

from collections.abc import Iterable
from typing import Any

from fastjax.nn.linear import PackedFormat

_HEAD = "lm_head"


def quantization_config(packed: PackedFormat, dense: Iterable[str]) -> dict[str, Any]:
    """Returns `quantization_config` as transformers writes it.

    Args:
      packed: Format of the 4-bit weights.
      dense: Hugging Face's full names of the linears that stay dense.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": packed.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": packed.code,
        "bnb_4bit_use_double_quant": packed.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [_HEAD, *dense],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
