"""A budget of broken rows: tolerated and counted, up to a number."""

from fastjax.errors import DataError

FIX = "correct the row, or tolerate some with --skip_bad_rows N"


class BadRows:
    """Counts refused rows and raises the first one above the budget.

    Attributes:
      errors: What was tolerated, in order.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.errors: list[DataError] = []

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
        if len(self.errors) >= self.allowed:
            raise error
        self.errors.append(error)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence that counts the tolerated rows, or none."""
        if not self.errors:
            return ()
        first, count = self.errors[0], len(self.errors)
        place = f" ({first.where})" if first.where else ""
        return (f"{count} broken rows left out, first: {first.what}{place}",)
