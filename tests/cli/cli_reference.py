"""Writes docs/cli.md out of --help: python tests/cli/cli_reference.py > docs/cli.md"""

from __future__ import annotations

from typer.testing import CliRunner

from actqkv_cpp.cli import app
from actqkv_cpp.cli._repl import COMMANDS

_HEAD = """# The command line

Written by `python tests/cli/cli_reference.py > docs/cli.md`: this is what `--help` says.

Answers, sources and JSON go to standard output, everything else to standard error. Sizes are tokens: `2048`, `2k`,
`128k`, `1m` (k = 1024). Exit status: 0; 1 failed, with one line of error and a hint; 2 wrong usage; 130 Ctrl-C.
"""


def reference() -> str:
    """The page."""
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    parts = [_HEAD]
    names = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    for command in ["", *names]:
        shown = runner.invoke(app, [*command.split(), "--help"], prog_name="actqkv").stdout
        parts.append(f"## actqkv {command}".rstrip() + f"\n\n```text\n{shown.strip()}\n```\n")
    parts.append("## In a chat\n\n| command | what it does |\n|---|---|")
    parts += [f"| `{command.usage}` | {command.help} |" for command in COMMANDS.values()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
