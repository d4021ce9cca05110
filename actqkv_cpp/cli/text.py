"""`actqkv text`: the text of a document as the model reads it."""

from __future__ import annotations

from typing import Annotated

import typer

from actqkv_cpp.cli import _options as o
from actqkv_cpp.cli._errors import reported
from actqkv_cpp.cli._output import Output
from actqkv_cpp.cli._session import find_documents
from actqkv_cpp.errors import ParameterError


def text(
    *,
    document: Annotated[
        str, typer.Argument(metavar="FILE", help="Document, or a KV file of one; - is standard input.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: name, text, anchors (offset and label), by_line.")
    ] = False,
    verbose: o.Verbose = False,
) -> None:
    """Print the text of a document as the model reads it.

    Offsets of sources (--sources, --json) are characters of this text.

    \b
    Examples:
      actqkv text book.pdf > book.txt
      actqkv text notes.docx --json
    """
    output = Output(verbose=verbose)
    with reported(output):
        files = find_documents([document]).all_files()
        if len(files) > 1:
            raise ParameterError(
                f"{document} holds {len(files)} documents, and offsets count in each apart", "print their own files"
            )
        (file,) = files
        if as_json:
            output.json(file.to_json())
        else:
            output.data(file.text if file.text.endswith("\n") else file.text + "\n")
