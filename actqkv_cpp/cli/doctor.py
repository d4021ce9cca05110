"""`actqkv doctor`: what is installed, what is used, and what to do about the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._errors import FAILED, reported
from actqkv_cpp.cli._output import Output


def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Tell what this machine and installation have, what of it is used, and how to get the rest.

    A finding is ok, unused (actqkv runs without it) or broken (it does not run; the exit status is then 1).

    \b
    Examples:
      actqkv doctor
      actqkv doctor --json
    """
    output = Output(quiet=quiet, verbose=verbose)
    with reported(output):
        from actqkv_cpp import doctor as examination  # noqa: PLC0415 (heavy)

        findings = examination.diagnose()
        found = examination.report(findings)
        if as_json:
            output.json(found)
        else:
            width = max(len(one.what) for one in findings)
            for one in findings:
                output.entry(f"{one.state:6}  {one.what:{width}}  ", " ".join(one.text.split()))
                if one.remedy:
                    output.entry(f"{'':6}  {'':{width}}  ", f"-> {one.remedy}")
        if not found["runs"]:
            raise typer.Exit(FAILED)
