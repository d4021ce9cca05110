"""`actqkv report`: draws what `actqkv eval` or `actqkv bench` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.files import check_free, written_atomically

_PAGES = (".html", ".htm")


def report(
    *,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT", help="Results of actqkv eval: files, or --out folders. Or files of actqkv bench --json."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="A page (.html), of eval only, or a picture (.png, .svg) to write."
        ),
    ],
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Draw results of actqkv eval or actqkv bench.

    Of eval: scores, heat maps, accuracy against length and budget. Of bench --json: tokens per second of reading and
    answering against the depth; what was extrapolated is hollow.

    The page is one file that needs no network. Pictures need matplotlib: pip install "actqkv[plot]".

    \b
    Examples:
      actqkv report needle/result.json -o report.html
      actqkv report needle/result.json kv/result.json -o figure.svg
      actqkv report bench.json -o bench.png
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        _report(files, out)
        output.note(f"wrote {out}")


def _report(files: list[Path], out: Path) -> None:
    from actqkv_cpp import drawing  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench import results as bench  # noqa: PLC0415 (heavy)
    from actqkv_cpp.evaluation import results as evaluation  # noqa: PLC0415 (heavy)

    if out.suffix not in (*_PAGES, *drawing.FORMATS):
        raise ParameterError(
            f"{out}: what is to be drawn is told by the end of the name", "end it in .html, .png or .svg"
        )
    kinds = {_kind(evaluation.result_file(path)) for path in files}
    if len(kinds) > 1:
        raise ParameterError("results of actqkv eval and of actqkv bench are drawn apart", "draw a report for each")
    if kinds == {bench.FORMAT}:
        _draw_benchmarks(files, out)
    else:
        _draw_evaluations(files, out)


def _kind(path: Path) -> str:
    """The format of a result that can be drawn."""
    from actqkv_cpp import resultfile  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench import results as bench  # noqa: PLC0415 (heavy)
    from actqkv_cpp.evaluation import results as evaluation  # noqa: PLC0415 (heavy)

    known, found = (evaluation.FORMAT, bench.FORMAT), resultfile.format_of(path)
    if found not in known:
        raise StateError(
            f"{path} is no result that can be drawn: its format is {found or 'not named'}, not {' or '.join(known)}",
            "give what actqkv eval --out or actqkv bench --json wrote; a bench that named no format must run again",
        )
    return found


def _draw_evaluations(files: list[Path], out: Path) -> None:
    from actqkv_cpp import drawing  # noqa: PLC0415 (heavy)
    from actqkv_cpp.evaluation import figure, page, results  # noqa: PLC0415 (heavy)

    found = [results.read(path) for path in files]
    check_free(out, drawing.MARK)
    if out.suffix in _PAGES:
        with written_atomically(out) as temporary:
            temporary.write_text(page.render(found), encoding="utf-8")
    else:
        figure.draw(found, out)


def _draw_benchmarks(files: list[Path], out: Path) -> None:
    from actqkv_cpp import drawing  # noqa: PLC0415 (heavy)
    from actqkv_cpp.bench import figure, results  # noqa: PLC0415 (heavy)

    if out.suffix in _PAGES:
        raise ParameterError(f"{out}: results of actqkv bench are drawn as pictures only", "end it in .png or .svg")
    found = [results.read(path) for path in files]
    check_free(out, drawing.MARK)
    figure.draw(found, out)
