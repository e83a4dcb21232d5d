"""Pre-quantised 4-bit checkpoints of bitsandbytes, bit for bit."""

from .config import quantization_config as quantization_config
from .nf4 import nf4_specs as nf4_specs
from .nf4 import nf4_tensors as nf4_tensors
from .nf4 import padded_nf4_tensors as padded_nf4_tensors
from .nf4 import read_nf4 as read_nf4
from .quant_state import QuantState as QuantState
from .quant_state import companion_keys as companion_keys
from .quant_state import parse_quant_state as parse_quant_state
from .quant_state import quantised_names as quantised_names
