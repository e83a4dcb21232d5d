"""Named sizes of the op for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An array of trained weights."""

    name: str
    shape: tuple[int, ...]


SMALL = (
    Case(name="rest", shape=(5, 1000)),
    Case(name="one_block", shape=(17,)),
)
INTERPRETED = (Case(name="whole_blocks", shape=(2, 64, 64)),)
ON_GPU = (Case(name="llama3_8b_q_lora", shape=(32, 4096, 16)),)
LARGE = (
    # All seven linears of 32 layers at rank 16 hold this many, as one array.
    Case(name="llama3_8b_lora", shape=(32, 81920, 16)),
    Case(name="llama3_8b_gate", shape=(4096, 14336)),
)
