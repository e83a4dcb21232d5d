"""Shapes of NF4 matrices for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A matrix of (inputs, outputs) and how many are stacked."""

    name: str
    inputs: int
    outputs: int
    layers: int | None = None


SMALL = (
    Case(name="one_element", inputs=1, outputs=1),
    Case(name="odd_size", inputs=5, outputs=3),
    Case(name="part_of_a_block", inputs=100, outputs=7),
    Case(name="whole_blocks", inputs=128, outputs=96),
    Case(name="blocks_cross_rows", inputs=96, outputs=64),
    Case(name="many_nested_blocks", inputs=192, outputs=258),
    Case(name="stacked", inputs=64, outputs=48, layers=3),
)
INTERPRETED = (
    Case(name="one_chunk", inputs=128, outputs=64),
    Case(name="three_chunks", inputs=96, outputs=256),
    Case(name="stacked_chunks", inputs=128, outputs=192, layers=2),
)
"""Small ones that the Mosaic GPU kernel can run."""

LARGE = (
    Case(name="llama3_8b_q", inputs=4096, outputs=4096),
    Case(name="llama3_8b_gate", inputs=4096, outputs=14336),
    Case(name="llama3_8b_down", inputs=14336, outputs=4096),
)
