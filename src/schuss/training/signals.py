"""Leaving a training when the system, or somebody at the keyboard, asks for it."""

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Signals"]


class Signals:
    """A block in which SIGTERM and SIGINT are noted instead of obeyed; a second SIGINT does what it did before.

    Outside of the main thread, where Python lets nobody handle signals, nothing is changed; neither is it for a signal
    that was ignored.

    Attributes:
        received: whether there was one.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None: of another language, which Python could not put back.
                if (before := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._before.pop(number))
