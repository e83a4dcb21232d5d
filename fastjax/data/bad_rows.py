"""A budget of broken rows: tolerated and counted, up to a number."""

from fastjax.data.report import counted
from fastjax.errors import DataError

FIX = "correct the row, or tolerate some with --skip_bad_rows N"
_LISTED, _MOST_SOUGHT = 10, 10_000


class BadRows:
    """Counts refused rows, and raises an error when the budget is spent.

    Args:
      allowed: Rows that are tolerated.
      lists_all: Reading goes on above the budget for 10,000 rows, so that one error
        names all that are broken among them; False raises at the first one.

    Attributes:
      count: Of refused rows.
      errors: The first of them, in order.
    """

    def __init__(self, allowed: int = 0, *, lists_all: bool = False) -> None:
        self.allowed = allowed
        self.count = 0
        self.errors: list[DataError] = []
        self._looked_at = 0
        self._lists_all = lists_all
        self._sought = max(_MOST_SOUGHT, allowed) if lists_all else allowed

    @property
    def is_spent(self) -> bool:
        """Whether more rows are broken than are allowed."""
        return self.count > self.allowed

    def refuse(self, what: str, where: str, *, fix: str = FIX) -> None:
        """Counts one broken row.

        Raises:
          DataError: The budget is spent.
        """
        self.take(DataError(what, where=where, fix=fix, code="FJ-DATA-ROW"))

    def take(self, error: DataError) -> None:
        """Counts one broken row by its error.

        Raises:
          DataError: The budget is spent.
        """
        self.count += 1
        if len(self.errors) < _LISTED:
            self.errors.append(error)
        if self.count > self._sought:
            raise self._listed() if self._lists_all else error

    def look_at_next(self) -> None:
        """Counts a row that is read although the budget is spent.

        Raises:
          DataError: They are so many that no more broken ones are sought.
        """
        if self.is_spent:
            self._looked_at += 1
            if self._looked_at > _MOST_SOUGHT:
                self.require_within_budget()

    def require_within_budget(self) -> None:
        """Raises the error that names the rows, if they are more than are allowed."""
        if self.is_spent:
            raise self.errors[0] if self.count == 1 else self._listed()

    def _listed(self) -> DataError:
        allowed = f", and skip_bad_rows allows {self.allowed}" if self.allowed else ""
        ended = self.count > self._sought
        many = f"more than {self._sought:,}" if ended else f"{self.count:,}"
        is_cut = self._looked_at > _MOST_SOUGHT and not ended
        lines = [f"{error.where}: {error.what}" for error in self.errors]
        if left := self.count - len(lines):
            lines.append("and others" if ended else f"and {left:,} more")
        if is_cut:
            lines.append(f"no more were sought after {_MOST_SOUGHT:,} further rows")
        return DataError(
            f"{'at least ' * is_cut}{many} rows are broken{allowed}",
            where="\n         ".join(lines),
            fix="correct them, or tolerate some with --skip_bad_rows N",
            code="FJ-DATA-ROW",
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """One note that counts the tolerated rows and names ten, or none."""
        if not self.count:
            return ()
        lines = [counted(self.count, "broken rows left out:")]
        lines += [f"{error.where}: {error.what}" for error in self.errors]
        if left := self.count - len(self.errors):
            lines.append(f"and {left:,} more")
        return ("\n  ".join(lines),)
