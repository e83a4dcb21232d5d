"""Matrices in 8 bits an element, with a scale for each output feature."""

from .array import STEP as STEP
from .array import Int8Array as Int8Array
from .array import dequantize as dequantize
from .array import quantize as quantize
from .array import scaled as scaled
