"""Ctrl-C as a wish: the first asks the work to stop at its next safe point, the second stops it at once."""

from __future__ import annotations

import os
import signal
import sys
import termios
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, Ctrl-C sets `requested`; a second one raises KeyboardInterrupt wherever the work is.

    What is typed meanwhile is not echoed into progress and answers; it waits for the next prompt.

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
        self._terminal = _without_echo()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._terminal is not None:
            with suppress(termios.error):
                termios.tcsetattr(sys.stderr, termios.TCSADRAIN, self._terminal)
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt where a stop was asked for; call it at points where stopping loses nothing."""
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _without_echo() -> list[Any] | None:
    """Turn the terminal's echo off; the settings before, or None where there is no terminal of ours."""
    with suppress(termios.error, OSError, ValueError):
        if os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp():  # in the background this would stop the process
            return None
        before = termios.tcgetattr(sys.stderr)
        silent = [*before]
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stderr, termios.TCSADRAIN, silent)
        return before
    return None
