"""Every op at real shapes."""

import functools

from .adam8bit import programs as adam8bit
from .attention import programs as attention
from .cross_entropy import programs as cross_entropy
from .gated_mlp import programs as gated_mlp
from .lora_matmul import programs as lora_matmul
from .nf4 import programs as nf4
from .program import Program
from .rms_norm import programs as rms_norm
from .rope import programs as rope


@functools.cache
def all_programs() -> tuple[Program, ...]:
    """Returns them in the order of the tables."""
    return (
        *nf4.programs(),
        *lora_matmul.programs(),
        *rms_norm.programs(),
        *rope.programs(),
        *gated_mlp.programs(),
        *attention.programs(),
        *cross_entropy.programs(),
        *adam8bit.programs(),
    )
