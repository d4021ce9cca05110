"""DOCX by mammoth, which makes HTML of it; headings are anchors."""

from __future__ import annotations

import io
from typing import Any

from actqkv_cpp.errors import DocumentError
from actqkv_cpp.formats import html
from actqkv_cpp.formats.extract import Extract, one_line


def read(name: str, data: bytes) -> Extract:
    """The text of a Word document.

    Raises:
        DocumentError: the extra is not installed; the file is damaged, or has no text.
    """
    try:
        import mammoth  # noqa: PLC0415 (an extra)
    except ImportError:
        raise DocumentError(
            f"{name} is a DOCX, which mammoth reads, and that is not installed", 'pip install "actqkv[documents]"'
        ) from None

    def no_image(image: Any) -> dict[str, str]:
        return {}

    try:
        page = mammoth.convert_to_html(io.BytesIO(data), convert_image=mammoth.images.img_element(no_image)).value
    except Exception as error:  # whatever a damaged file brings up: zipfile, expat, KeyError, ...
        raise DocumentError(
            f"{name} is a damaged DOCX: {one_line(error)}", "open it in a word processor and save it again"
        ) from None
    found = html.extract(name, page)
    if not found.text:
        raise DocumentError(f"{name} is a DOCX without text", "it needs at least a word")
    return found
