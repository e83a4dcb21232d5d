"""Named cases of the LoRA products for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Projections of one input and what they carry.

    `ranks` has an entry for each of `outputs`; 0 is a projection without adapter.
    """

    name: str
    lead: tuple[int, ...]
    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    is_quantized: bool = False
    has_bias: bool = False
    has_magnitude: bool = False
    dropout_rate: float = 0.0


SMALL = (
    Case(name="one", lead=(40,), inputs=24, outputs=(32,), ranks=(4,)),
    Case(name="frozen_only", lead=(5,), inputs=24, outputs=(16,), ranks=(0,)),
    Case(name="odd_sizes", lead=(2, 7), inputs=23, outputs=(19,), ranks=(3,)),
    Case(name="no_leading_axes", lead=(), inputs=16, outputs=(8,), ranks=(2,)),
    Case(
        name="qkv_mixed",
        lead=(2, 20),
        inputs=32,
        outputs=(48, 16, 16),
        ranks=(8, 4, 0),
        is_quantized=True,
        has_bias=True,
    ),
    Case(
        name="gate_up_joined",
        lead=(3, 30),
        inputs=16,
        outputs=(64, 64),
        ranks=(4, 2),
        is_quantized=True,
    ),
    Case(
        name="down_joined_backward",
        lead=(200,),
        inputs=96,
        outputs=(24,),
        ranks=(4,),
        is_quantized=True,
    ),
    Case(
        name="dropout",
        lead=(2, 24),
        inputs=32,
        outputs=(40, 24),
        ranks=(4, 4),
        has_bias=True,
        dropout_rate=0.3,
    ),
    Case(
        name="dora",
        lead=(2, 24),
        inputs=32,
        outputs=(40, 24),
        ranks=(4, 8),
        is_quantized=True,
        has_bias=True,
        has_magnitude=True,
    ),
    Case(
        name="dora_dropout",
        lead=(50,),
        inputs=32,
        outputs=(40,),
        ranks=(4,),
        has_magnitude=True,
        dropout_rate=0.2,
    ),
)
INTERPRETED = (
    Case(
        name="group_with_bias",
        lead=(2, 64),
        inputs=128,
        outputs=(128, 128),
        ranks=(4, 0),
        is_quantized=True,
        has_bias=True,
    ),
    Case(name="large_rank", lead=(256,), inputs=128, outputs=(128,), ranks=(72,)),
    Case(
        name="few_rows",
        lead=(5,),
        inputs=512,
        outputs=(256, 256),
        ranks=(4, 0),
        is_quantized=True,
        has_bias=True,
    ),
    Case(
        name="no_adapter",
        lead=(128,),
        inputs=128,
        outputs=(128,),
        ranks=(0,),
        is_quantized=True,
    ),
    Case(
        name="unequal_ranks",
        lead=(128,),
        inputs=128,
        outputs=(128, 128),
        ranks=(24, 8),
        is_quantized=True,
    ),
    Case(
        name="three_with_bias",
        lead=(128,),
        inputs=128,
        outputs=(128, 128, 128),
        ranks=(40, 0, 12),
        is_quantized=True,
        has_bias=True,
    ),
)
"""Small ones that the Mosaic GPU kernels can run."""

LARGE = (
    Case(
        name="llama3_8b_qkv",
        lead=(2, 4096),
        inputs=4096,
        outputs=(4096, 1024, 1024),
        ranks=(16, 16, 16),
        is_quantized=True,
    ),
    Case(
        name="llama3_8b_gate_up",
        lead=(2, 4096),
        inputs=4096,
        outputs=(14336, 14336),
        ranks=(16, 16),
        is_quantized=True,
    ),
    Case(
        name="llama3_8b_down",
        lead=(2, 4096),
        inputs=14336,
        outputs=(4096,),
        ranks=(16,),
        is_quantized=True,
    ),
)
_RATED_SHAPES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "up": (4096, (14336,)),
    "down": (14336, (4096,)),
}


def _rated(rows: int, shape: str, rank: int = 16) -> Case:
    inputs, outputs = _RATED_SHAPES[shape]
    return Case(
        name=f"{rows}_{shape}" + ("" if rank == 16 else f"_rank{rank}"),
        lead=(rows,),
        inputs=inputs,
        outputs=outputs,
        ranks=(rank,) * len(outputs),
        is_quantized=True,
    )


DECIDING = tuple(_rated(rows, "up") for rows in (8192, 2048, 512, 16))
"""Those whose times choose the default: the largest linear at several row counts."""

RATED = (
    *DECIDING,
    *(_rated(rows, "up") for rows in (4096, 64, 1)),
    *(
        _rated(rows, shape)
        for rows in (8192, 4096, 2048)
        for shape in ("qkv", "o", "down")
    ),
    _rated(2048, "qkv", rank=32),
)
"""The linears of Llama-3-8B at several numbers of tokens."""
