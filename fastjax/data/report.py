"""What a data set holds, as a user reads it before a run."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int64

from fastjax.data.documents import Documents

_BINS = 12
_OF_ONE = {
    "rows": "row",
    "documents": "document",
    "steps": "step",
    "are": "is",
    "have": "has",
    "equal": "equals",
}


def counted(count: int, what: str) -> str:
    """Returns the count and what is said of so many `rows`, `documents` or `steps`."""
    words = what.split(" ")
    if count == 1:
        words = [_OF_ONE.get(word, word) for word in words]
    return " ".join([f"{count:,}", *words])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Counts of one tokenised data set.

    Attributes:
      rows: Documents that are kept.
      tokens: Tokens of the kept documents.
      trained_tokens: Targets that carry loss.
      truncated: Rows that were cut.
      split: Rows that became several documents.
      dropped_overlong: Rows left out because of their length.
      dropped_untrained: Rows left out because nothing of them is trained.
      cut_to_nothing: Those of them that lost their trained tokens to the cut.
      refused: Rows that could not be used and were tolerated.
      duplicates: Kept documents that an earlier one equals.
      max_length: Most tokens of a document.
      length_95: Tokens that 95 % of the rows do not exceed, before any cut.
      histogram: Pairs of a length and the rows up to it, above the one before.
      notes: What a user should know, one sentence each.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    split: int = 0
    dropped_overlong: int = 0
    dropped_untrained: int = 0
    cut_to_nothing: int = 0
    refused: int = 0
    duplicates: int = 0
    max_length: int
    length_95: int
    length_99: int
    length_max: int
    histogram: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trained_share(self) -> float:
        """Share of the tokens that carry loss."""
        return self.trained_tokens / max(self.tokens, 1)

    @property
    def uncut(self) -> str:
        """Words behind the lengths where documents are shorter than rows were."""
        cut = self.truncated, self.split, self.dropped_overlong, self.cut_to_nothing
        return " before any cut" if any(cut) else ""

    @property
    def left_out(self) -> tuple[tuple[int, str], ...]:
        """Counts above zero of rows that were changed or left out, and why."""
        counts = (
            (self.truncated, f"rows cut at {self.max_length:,} tokens"),
            (self.split, f"rows split at {self.max_length:,} tokens"),
            (self.dropped_overlong, f"rows dropped: over {self.max_length:,} tokens"),
            (
                self.cut_to_nothing,
                f"rows dropped: trained only after {self.max_length:,} tokens",
            ),
            (
                self.dropped_untrained - self.cut_to_nothing,
                "rows dropped: nothing to train",
            ),
            (self.refused, "broken rows left out"),
            (self.duplicates, "documents equal an earlier one"),
        )
        return tuple((count, what) for count, what in counts if count)

    def __str__(self) -> str:
        lines = [
            f"{counted(self.rows, 'rows')}, {self.tokens:,} tokens, "
            f"{self.trained_share:.1%} trained; length 95 % {self.length_95:,}, "
            f"99 % {self.length_99:,}, max {self.length_max:,}{self.uncut}"
        ]
        lines += [counted(count, what) for count, what in self.left_out]
        return "\n".join([*lines, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Returns every count, as JSON holds it."""
        return dataclasses.asdict(self) | {"trained_share": self.trained_share}


def data_report(
    documents: Documents,
    lengths: Counter[int],
    *,
    max_length: int,
    counts: Counter[str] | None = None,
    notes: tuple[str, ...] = (),
) -> DataReport:
    """Returns the report of tokenised documents.

    Args:
      documents: Those that are kept.
      lengths: Number of tokens to the rows that had so many before any cut, also of
        those left out.
      max_length: Most tokens of a document.
      counts: Of rows that were changed or left out, by the names of `DataReport`.
      notes: What a user should know.
    """
    sizes, rows = np.array(sorted((lengths or {0: 1}).items())).T
    return DataReport(
        rows=len(documents),
        tokens=documents.tokens,
        trained_tokens=documents.trained_tokens,
        duplicates=_duplicates(documents),
        max_length=max_length,
        length_95=_not_exceeded(sizes, rows, 0.95),
        length_99=_not_exceeded(sizes, rows, 0.99),
        length_max=int(sizes[-1]),
        histogram=_histogram(sizes, rows),
        notes=notes,
        **(counts or {}),
    )


def _duplicates(documents: Documents) -> int:
    hashes = documents.content_hashes()
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def _not_exceeded(
    sizes: Int64[np.ndarray, " N"], rows: Int64[np.ndarray, " N"], share: float
) -> int:
    """Returns the least of the rising sizes that a share of the rows do not exceed."""
    up_to = np.cumsum(rows)
    return int(sizes[np.searchsorted(up_to, share * up_to[-1])])


def _histogram(
    sizes: Int64[np.ndarray, " N"], rows: Int64[np.ndarray, " N"]
) -> tuple[tuple[int, int], ...]:
    """Returns rows by length in powers of two; what is far shorter counts as one."""
    exponents = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    first = max(int(exponents.max()) - _BINS + 1, int(exponents.min()))
    counts = np.bincount(np.maximum(exponents, first) - first, weights=rows)
    return tuple((1 << (first + i), int(count)) for i, count in enumerate(counts))
