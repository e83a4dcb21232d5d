"""The console that runs speak on."""

import sys

from rich.console import Console


class _LastingConsole(Console):
    """A console whose reader may leave: what follows is then said to nobody."""

    def on_broken_pipe(self) -> None:
        """Goes quiet; a run does not end because nobody looks."""
        self.quiet = True


def open_console() -> Console:
    """Returns a console on the standard error."""
    return _LastingConsole(file=sys.stderr)
