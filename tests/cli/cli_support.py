"""The `actqkv` command seen from outside: as a program, and by a person in a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pexpect

import actqkv_cpp

LONG = Path(__file__).parents[2] / "examples" / "harbour.txt"  # 32K tokens: time enough for Ctrl-C
QUESTION, ANSWER = "Who was elected in Sussith?", "Sord Ferdman"
OTHER_QUESTION = "Please look up the product code of the judge from Goupford."
OTHER_ANSWER = "QR-5598"

_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][0-9A-B]|[=>])")


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    status: int
    out: str
    err: str


Actqkv = Callable[..., Result]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: the package under test, a terminal without replies to queries, 80 columns."""
    package = str(Path(actqkv_cpp.__file__).parents[1])
    known = {"PYTHONPATH": package, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "80"}
    dropped = ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")
    return {name: value for name, value in os.environ.items() if name not in dropped} | known | more


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "actqkv_cpp", *map(str, arguments)]


class Terminal:
    """A person at a terminal of 100 columns: types, waits for words, reads the screen without its colours."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.log = ""
        self._child: pexpect.spawn[str] = pexpect.spawn(
            arguments[0],
            arguments[1:],
            cwd=str(folder),
            env=environment(),  # type: ignore[arg-type]
            encoding="utf-8",
            timeout=60,
            dimensions=(30, 100),
        )

    def wait(self, *words: str) -> str:
        """The screen's text up to the first of `words`, which are regular expressions."""
        self._child.expect(list(words))
        seen = _ESCAPE.sub("", f"{self._child.before}{self._child.after}")
        self.log += seen
        return seen

    def prompt(self) -> str:
        """The text up to the next prompt that waits for a line."""
        return self.wait(r"\x1b\[\?2004h")  # bracketed paste goes on when the line editor starts

    def type(self, line: str) -> None:
        self._child.send(line + "\r")

    def press(self, key: str) -> None:
        """Ctrl with a letter."""
        self._child.sendcontrol(key)

    def end(self) -> int:
        """Wait for the end of the command; its exit status."""
        self._child.expect(pexpect.EOF)
        self.log += _ESCAPE.sub("", self._child.before or "")
        self._child.close()
        assert self._child.exitstatus is not None, f"killed by signal {self._child.signalstatus}"
        return self._child.exitstatus

    def close(self) -> None:
        self._child.close(force=True)


def assert_failed(found: Result, *words: str) -> None:
    """One error with a hint, nothing on standard output, and `words` among the two."""
    assert (found.status, found.out) == (1, ""), found.err
    error, hint = found.err.splitlines()[-2:]
    assert error.startswith("error: "), found.err
    assert hint.startswith("hint: "), found.err
    for word in words:
        assert word in error + hint, found.err
