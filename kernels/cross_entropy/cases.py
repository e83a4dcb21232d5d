"""Named cases of the cross-entropy for tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes and settings; `ignored` is the fraction of targets without loss."""

    name: str
    rows: int
    features: int
    vocabulary: int
    chunk_tokens: int
    softcap: float | None = None
    ignored: float = 0.0


SMALL = (
    Case(name="one_chunk", rows=24, features=16, vocabulary=50, chunk_tokens=64),
    Case(name="even_chunks", rows=64, features=16, vocabulary=50, chunk_tokens=16),
    Case(
        name="odd_chunks",
        rows=53,
        features=24,
        vocabulary=101,
        chunk_tokens=16,
        ignored=0.4,
    ),
    Case(
        name="softcap",
        rows=33,
        features=16,
        vocabulary=64,
        chunk_tokens=16,
        softcap=3.0,
        ignored=0.2,
    ),
    Case(
        name="all_ignored",
        rows=20,
        features=8,
        vocabulary=30,
        chunk_tokens=8,
        ignored=1.0,
    ),
    Case(name="one_row", rows=1, features=8, vocabulary=30, chunk_tokens=8),
)
INTERPRETED = (
    Case(
        name="two_chunks",
        rows=150,
        features=64,
        vocabulary=256,
        chunk_tokens=128,
        ignored=0.2,
    ),
)
LARGE = (
    Case(
        name="llama3_8b",
        rows=8192,
        features=4096,
        vocabulary=128256,
        chunk_tokens=2048,
    ),
)
TIMED = (
    *LARGE,
    # The vocabulary is an odd multiple of 128.
    Case(
        name="qwen3_4b",
        rows=8192,
        features=2560,
        vocabulary=151936,
        chunk_tokens=2048,
    ),
)
