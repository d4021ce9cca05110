"""Help, version and the reference page."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_reference import reference
from cli_support import Actqkv, environment

from actqkv_cpp import __version__, parse_size
from actqkv_cpp.cli.ask import ask
from actqkv_cpp.cli.chat import chat
from actqkv_cpp.cli.eval import evaluate

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_without_arguments(actqkv: Actqkv) -> None:
    """A newcomer who types `actqkv` is not told what to type next."""
    found = actqkv()
    assert found.status == 0
    assert "actqkv ask model.gguf -d book.txt" in found.out


def test_version(actqkv: Actqkv) -> None:
    """Bug reports cannot say which version, and over which llama-cpp-python."""
    assert re.fullmatch(rf"actqkv {re.escape(__version__)} \(llama-cpp-python \S+\)\n", actqkv("--version").out)


def _words(page: str) -> list[str]:
    """The page without what versions of Typer lay out differently: types of arguments, brackets, dots, line ends."""
    return re.sub(r"<\w[^>]*>|[\[\]\\.]", " ", page).split()


def test_reference_page() -> None:
    """docs/cli.md says something else than --help: write it with python tests/cli/cli_reference.py > docs/cli.md."""
    assert _words(DOCS.read_text(encoding="utf-8")) == _words(reference())


@pytest.mark.parametrize("command", [chat, ask, evaluate])
def test_defaults_in_help(command: object) -> None:
    """The help promises another default than the command has."""
    assert callable(command)
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        option = getattr(parameter.annotation, "__metadata__", (None,))[0]
        promised = re.search(r"\[default: (.*)\]", getattr(option, "help", None) or "")
        if promised is None or parameter.default in (None, inspect.Parameter.empty):
            continue
        if isinstance(parameter.default, str):
            assert promised[1] == parameter.default, name
        elif isinstance(parameter.default, float):
            assert float(promised[1]) == parameter.default, name
        else:
            assert parse_size(promised[1]) == parameter.default, name


def test_help_is_quick() -> None:
    """--help loads llama.cpp and NumPy, and takes a second instead of a moment."""
    code = (
        "import sys, runpy\nsys.argv = ['actqkv', 'ask', '--help']\n"
        "try: runpy.run_module('actqkv_cpp', run_name='__main__')\nexcept SystemExit: pass\n"
        "assert not {'llama_cpp', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True)
