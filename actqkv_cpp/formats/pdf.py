"""PDF by PDFium: text in the order of the file, lines as they are printed; every page an anchor ("p. 214")."""

from __future__ import annotations

import re
from typing import Any

from actqkv_cpp.errors import DocumentError
from actqkv_cpp.formats.extract import Builder, Extract, one_line

_PASSWORD, _SECURITY = 4, 5  # FPDF_ERR_* of fpdfview.h
_HYPHEN = re.compile("[\x02\ufffe]\n?")  # PDFium's mark where a word was divided at the end of a line


def read(name: str, data: bytes) -> Extract:
    """The text of a PDF; pages are separated by a blank line. An anchor has the page's printed number, where the file
    tells it, else its place in the file.

    Raises:
        DocumentError: the extra is not installed; the file has a password, is damaged, or has no text.
    """
    try:
        import pypdfium2  # noqa: PLC0415 (an extra)
    except ImportError:
        raise DocumentError(
            f"{name} is a PDF, which pypdfium2 reads, and that is not installed", 'pip install "actqkv[documents]"'
        ) from None
    try:
        with pypdfium2.PdfDocument(data) as file:
            builder = Builder()
            n_pages = len(file)
            for i in range(n_pages):
                builder.gap(2)
                text = _page_text(file, i)
                if text:
                    builder.anchor(f"p. {file.get_page_label(i).strip() or i + 1}")
                    builder.write(text)
    except pypdfium2.PdfiumError as error:
        raise _refusal(name, error) from None
    found = builder.build()
    if not found.text:
        pages = f"its {n_pages} pages are" if n_pages != 1 else "its page is"
        raise DocumentError(
            f"{name} is a PDF without text: {pages} empty or scanned images",
            "recognise the text first, for example: ocrmypdf scan.pdf book.pdf",
        )
    return found


def _page_text(file: Any, i: int) -> str:
    page = file[i]
    textpage = page.get_textpage()
    text = textpage.get_text_bounded().replace("\r\n", "\n").replace("\r", "\n")
    textpage.close()
    page.close()
    return _HYPHEN.sub("", text).strip()


def _refusal(name: str, error: Any) -> DocumentError:
    if error.err_code == _PASSWORD:
        return DocumentError(
            f"{name} is a PDF with a password",
            "save it without one, for example: qpdf --decrypt --password=WORD book.pdf open.pdf",
        )
    if error.err_code == _SECURITY:
        return DocumentError(
            f"{name} is a PDF in an encryption that PDFium does not know",
            "save it without one in the program it is from",
        )
    return DocumentError(
        f"{name} is a damaged PDF: {one_line(error)}",
        "get it again, or repair it, for example: qpdf book.pdf whole.pdf",
    )
