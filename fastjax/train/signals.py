"""Ctrl-C and friends: the first one asks a run to stop, the second one stops it."""

import signal
import threading
from types import FrameType, TracebackType

from fastjax import runtime

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Notes the first SIGINT, SIGTERM or SIGHUP; a second raises KeyboardInterrupt.

    One that is ignored, as `nohup` makes SIGHUP, stays ignored. Outside the main
    thread, where Python allows no handlers, it never asks.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[signal.Signals, object] = {}

    @property
    def is_requested(self) -> bool:
        """Whether a signal, or a file in its place, has come."""
        return bool(self.signal_name)

    def ask(self, name: str) -> None:
        """Asks the run to stop, as the first signal does."""
        self.signal_name = self.signal_name or name

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            runtime.require_no_interrupt()
            for number in _ASKING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
