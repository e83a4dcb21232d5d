"""4-bit weights in the format of bitsandbytes (QLoRA, arxiv.org/abs/2305.14314)."""

from .api import dequantize as dequantize
from .api import dequantize_group as dequantize_group
from .array import NF4Array as NF4Array
from .codebooks import CODEBOOKS as CODEBOOKS
from .codebooks import DYNAMIC_MAP as DYNAMIC_MAP
from .quantize import quantize as quantize
