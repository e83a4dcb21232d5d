"""What a data set holds, as a user reads it before a run."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Counts of one tokenised data set.

    Attributes:
      rows: Documents that are kept.
      tokens: Tokens of the kept documents.
      trained_tokens: Targets that carry loss.
      truncated: Kept documents that were cut.
      dropped_overlong: Documents left out because of their length.
      dropped_untrained: Documents left out because nothing of them is trained.
      cut_to_nothing: Those of them that lost their trained tokens to the cut.
      length_95: Tokens that 95 % of the documents do not exceed, before any cut.
      notes: What a user should know, one sentence each.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped_overlong: int
    dropped_untrained: int
    cut_to_nothing: int
    max_length: int
    length_95: int
    length_99: int
    length_max: int
    notes: tuple[str, ...] = ()

    @property
    def trained_share(self) -> float:
        """Share of the tokens that carry loss."""
        return self.trained_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained_share:.1%} "
            f"trained; length 95 % {self.length_95:,}, 99 % {self.length_99:,}, "
            f"max {self.length_max:,}"
        ]
        left_out = [
            (self.truncated, f"cut at {self.max_length:,} tokens"),
            (self.dropped_overlong, f"dropped: over {self.max_length:,} tokens"),
            (self.dropped_untrained, "dropped: nothing to train"),
        ]
        lines += [f"{count:,} rows {what}" for count, what in left_out if count]
        return "\n".join([*lines, *self.notes])
