"""`actqkv report`: draws what `actqkv eval` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.errors import ParameterError
from actqkv_cpp.files import check_free, written_atomically

_PAGES = (".html", ".htm")


def report(
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="RESULT", help="Results of actqkv eval: files, or --out folders.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="A page (.html) or a picture (.png, .svg) to write.")
    ],
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Draw results of actqkv eval: scores, heat maps, accuracy against length and budget.

    The page is one file that needs no network. Pictures need matplotlib: pip install "actqkv[plot]".

    \b
    Examples:
      actqkv report needle/result.json -o report.html
      actqkv report needle/result.json kv/result.json -o figure.svg
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        _report(files, out)
        output.note(f"wrote {out}")


def _report(files: list[Path], out: Path) -> None:
    from actqkv_cpp.evaluation import figure, page, results  # noqa: PLC0415 (heavy)

    if out.suffix not in (*_PAGES, *figure.FORMATS):
        raise ParameterError(
            f"{out}: what is to be drawn is told by the end of the name", "end it in .html, .png or .svg"
        )
    found = [results.read(path) for path in files]
    check_free(out, page.MARK)
    if out.suffix in _PAGES:
        with written_atomically(out) as temporary:
            temporary.write_text(page.render(found), encoding="utf-8")
    else:
        figure.draw(found, out)
