"""The errors that users see: what, where, why, what to do, and an exit code."""

from collections.abc import Sequence


class FastJaxError(Exception):
    """An error with a message for people.

    Args:
      what: One sentence: what went wrong.
      where: File, line, field or tensor; empty when `what` says it.
      fix: What to do about it.
      code: Stable identifier such as `FJ-DATA-002`, for search and documentation.
    """

    exit_code = 1
    default_code = "FJ-000"

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", code: str | None = None
    ) -> None:
        self.what, self.where, self.fix = what, where, fix
        self.code = code or self.default_code
        lines = [f"{self.code}: {what}"]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  fix:   {fix}"] if fix else []
        super().__init__("\n".join(lines))


class ConfigError(FastJaxError, ValueError):
    """A flag, field or argument is wrong, or contradicts another.

    Attributes:
      problems: One sentence for each thing that is wrong.
    """

    exit_code = 2
    default_code = "FJ-CONFIG"
    problems: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, problems: Sequence[str], *, where: str = "", fix: str = ""
    ) -> "ConfigError":
        """Returns one error that tells everything that is wrong, a line each."""
        what, lines = f"{len(problems)} settings are wrong", [where, *problems]
        if len(problems) == 1:
            what, lines = problems[0], [where]
        place = "\n         ".join(line for line in lines if line)
        error = cls(what, where=place, fix=fix)
        error.problems = tuple(problems)
        return error


class DataError(FastJaxError, ValueError):
    """A data file or row cannot be used."""

    exit_code = 3
    default_code = "FJ-DATA"


class ModelError(FastJaxError):
    """A model folder, tokenizer or adapter cannot be used."""

    exit_code = 4
    default_code = "FJ-MODEL"


class CheckpointMismatch(ModelError, ValueError):
    """Tensors are missing, unexpected or misshapen."""

    default_code = "FJ-MODEL-MISMATCH"


class EnvironmentFault(FastJaxError):
    """The machine lacks something: device, driver, package, network, token."""

    exit_code = 5
    default_code = "FJ-ENV"


class OutOfMemory(FastJaxError):
    """The run needs more memory than there is."""

    exit_code = 6
    default_code = "FJ-MEMORY"


class TrainingDiverged(FastJaxError):
    """Loss, gradients or parameters are not finite any more."""

    exit_code = 7
    default_code = "FJ-DIVERGED"


class StorageError(FastJaxError, OSError):
    """A file or folder cannot be written or read back."""

    exit_code = 8
    default_code = "FJ-STORAGE"


class Interrupted(FastJaxError):
    """The user or the system asked the run to stop; the state is saved."""

    exit_code = 130
    default_code = "FJ-INTERRUPTED"


def printable(text: object, limit: int = 200) -> str:
    """Returns text from a file, escaped and cut, safe to show on a terminal."""
    shown = str(text).encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
