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
        error = DataError(what, where=where, fix=fix, code="FJ-DATA-ROW")
        if len(self.errors) >= self.allowed:
            raise error
        self.errors.append(error)
