"""Fixtures of the command line: run it, type at it, and documents to do so with."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from cli_support import LONG, Actqkv, Result, Terminal, command, environment
from tiny_gguf import EOS, EOT, make_tiny_gguf


@pytest.fixture
def actqkv(tmp_path: Path) -> Actqkv:
    """Run the command in an empty folder, without a terminal; `stdin` is text or bytes for it."""

    def run(*arguments: object, stdin: str | bytes = "", new_session: bool = False, **env: str) -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            command(*arguments),
            input=data,
            capture_output=True,
            cwd=tmp_path,
            env=environment(**env),
            start_new_session=new_session,  # without a terminal of its own
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))

    return run


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start the command in a pseudo-terminal, in an empty folder."""
    started: list[Terminal] = []

    def start(*arguments: object, shell: bool = False) -> Terminal:
        words = ["/bin/sh", "-c", str(arguments[0])] if shell else command(*arguments)
        started.append(Terminal(words, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four thousand characters with the answers to QUESTION and OTHER_QUESTION."""
    text = LONG.read_text(encoding="utf-8")
    one, two = sorted((text.index("Sussith"), text.index("Goupford")))
    path = tmp_path_factory.mktemp("book") / "book.txt"
    around = text[one - 800 : one + 800] + text[max(one, two - 1600) + 800 : two + 800]
    path.write_text(text[: 4200 - len(around)] + around, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that never ends an answer: the logits of all ends are zero, never the greatest."""
    path = make_tiny_gguf(tmp_path_factory.mktemp("models") / "babbler.gguf")
    reader = gguf.GGUFReader(path, "r+")
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    output.data[[EOS, EOT]] = 0
    reader.data.flush()
    return path
