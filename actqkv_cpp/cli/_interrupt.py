"""Ctrl-C as a wish: the first asks the work to stop at its next safe point, the second stops it at once."""

from __future__ import annotations

import signal
import sys
import termios
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, Ctrl-C sets `requested`; a second one raises KeyboardInterrupt wherever the work is.

    Example:
        >>> with Interrupt() as stop:
        ...     llm.read("book.txt", progress=lambda done, total: not stop.requested)
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._terminal: list[Any] | None = None

    def __enter__(self) -> Interrupt:
        self.requested = False
        self._before = signal.signal(signal.SIGINT, self._handle)
        self._hide_caret()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._terminal is not None:
            with suppress(termios.error):
                termios.tcsetattr(sys.stderr, termios.TCSADRAIN, self._terminal)

    def check(self) -> None:
        """Raise KeyboardInterrupt where a stop was asked for; call it at points where stopping loses nothing."""
        if self.requested:
            raise KeyboardInterrupt

    def _hide_caret(self) -> None:
        """Keep the terminal from writing ^C into progress and answers."""
        with suppress(termios.error, OSError, ValueError):  # standard error is no terminal
            self._terminal = termios.tcgetattr(sys.stderr)
            quiet = [*self._terminal]
            quiet[3] &= ~termios.ECHOCTL
            termios.tcsetattr(sys.stderr, termios.TCSADRAIN, quiet)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
