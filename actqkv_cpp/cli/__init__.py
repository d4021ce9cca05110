"""The command line: `actqkv`. One file per command; options, errors and output are shared."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from actqkv_cpp import __version__
from actqkv_cpp.cli.ask import ask
from actqkv_cpp.cli.bench import bench
from actqkv_cpp.cli.chat import chat
from actqkv_cpp.cli.doctor import doctor
from actqkv_cpp.cli.eval import evaluate
from actqkv_cpp.cli.index import index
from actqkv_cpp.cli.inspect import inspect
from actqkv_cpp.cli.report import report
from actqkv_cpp.cli.text import text

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"actqkv {__version__} (llama-cpp-python {version('llama-cpp-python')})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def actqkv(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Chat with documents far longer than the model's window.

    A document is read once, all of it is kept, and each step attends about 2,000 of its tokens. Without a MODEL a small
    bundled one answers: it is for trying out.

    \b
    Examples:
      actqkv chat -d book.txt
      actqkv ask model.gguf -d book.txt "Who kept the key?" --sources
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(chat)
app.command()(ask)
app.command()(index)
app.command()(bench)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(report)
app.command()(doctor)
app.command()(text)
