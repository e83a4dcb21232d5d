"""The console that runs speak on, and the same for notebooks."""

import io
import sys

from rich.console import Console, RenderableType
from rich.measure import Measurement

_WIDEST = 10_000


class _LastingConsole(Console):
    """A console whose reader may leave: what follows is then said to nobody."""

    def on_broken_pipe(self) -> None:
        """Goes quiet; a run does not end because nobody looks."""
        self.quiet = True


def open_console() -> Console:
    """Returns a console on the standard error."""
    return _LastingConsole(file=sys.stderr)


def as_html(shown: RenderableType, *, width: int = 100) -> str:
    """Returns what a terminal of so many columns shows, for a notebook."""
    console = Console(record=True, file=io.StringIO(), width=width)
    console.print(shown)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def whole_width(shown: RenderableType) -> int:
    """Returns the columns that a table takes when nothing in it is cut or broken."""
    console = Console(file=io.StringIO(), width=_WIDEST)
    return Measurement.get(console, console.options, shown).maximum


def say(console: Console, text: str) -> None:
    """Prints a text as it is, on lines as long as they are."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
