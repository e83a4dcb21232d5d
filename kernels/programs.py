"""Every program of every op that has kernels of its own."""

from .nf4 import programs as nf4
from .program import Program
from .rms_norm import programs as rms_norm


def all_programs() -> tuple[Program, ...]:
    """Returns them in the order of the tables."""
    return (*nf4.programs(), *rms_norm.programs())
