"""The smallest files of the formats that documents come in, made of bytes here: PDF, DOCX, EPUB."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

# Of a standard security handler; no password fits such an owner's and user's entry.
_LOCK = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>"


def pdf(pages: Sequence[Sequence[str]], *, first_label: str | None = None, locked: bool = False) -> bytes:
    """A PDF of Helvetica lines.

    Args:
        pages: lines of each page, Latin-1.
        first_label: printed number of the first page, in small Roman numerals if that is "i", else decimal.
        locked: ask for a password.
    """
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    labels = ""
    if first_label is not None:
        style = "/S/r" if first_label == "i" else f"/S/D/St {first_label}"
        labels = f"/PageLabels<</Nums[0<<{style}>>]>>"
    objects = [
        f"<</Type/Catalog/Pages 2 0 R{labels}>>".encode(),
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, lines in enumerate(pages):
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {5 + 2 * i} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>".encode()
        )
        shown = "".join(f"({_string(line)}) Tj T*\n" for line in lines)
        content = f"BT /F1 12 Tf 14 TL 72 720 Td\n{shown}ET".encode("latin-1")
        objects.append(f"<</Length {len(content)}>>stream\n".encode() + content + b"\nendstream")
    objects += [_LOCK] if locked else []
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj".encode() + body + b"endobj\n"
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{at:010} 00000 n \n" for at in offsets)
    lock = f"/Encrypt {len(objects)} 0 R/ID[<00><00>]" if locked else ""
    trailer = f"trailer<</Size {len(objects) + 1}/Root 1 0 R{lock}>>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + table.encode() + trailer.encode()


def docx(paragraphs: Sequence[tuple[str, str]]) -> bytes:
    """A DOCX of paragraphs (style, text); the style is "" or "heading 1" to "heading 6". "\\t" parts a row's cells."""
    return zipped({
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
        'wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/'
        'officeDocument" Target="word/document.xml"/></Relationships>',
        "word/styles.xml": _word("styles", "".join(
            f'<w:style w:type="paragraph" w:styleId="H{i}"><w:name w:val="heading {i}"/></w:style>' for i in range(1, 7)
        )),
        "word/document.xml": _word("document", f"<w:body>{''.join(_paragraph(*p) for p in paragraphs)}</w:body>"),
    })  # fmt: skip


def epub(chapters: Mapping[str, str], *, contents: Mapping[str, str] | None = None, locked: bool = False) -> bytes:
    """An EPUB 3 of files (name, body in XHTML) in reading order.

    Args:
        contents: titles by file, of the table of contents.
        locked: say that the files are encrypted.
    """
    names = list(chapters)
    items = "".join(
        f'<item id="c{i}" href="{name}" media-type="application/xhtml+xml"/>' for i, name in enumerate(names)
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(names)))
    entries = "".join(f'<li><a href="{name}">{title}</a></li>' for name, title in (contents or {}).items())
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OPS/package.opf"/></rootfiles></container>',
        "OPS/package.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
        f'<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>{items}</manifest>'
        f"<spine>{spine}</spine></package>",
        "OPS/nav.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body><nav><ol>{entries}</ol></nav></body></html>',
    }
    for name, body in chapters.items():
        page = f'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>{body}</html>'
        files[f"OPS/{name}"] = page
    if locked:
        references = "".join(f'<CipherReference URI="OPS/{name}"/>' for name in names)
        files["META-INF/encryption.xml"] = f"<encryption>{references}</encryption>"
    return zipped(files)


def zipped(files: Mapping[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def _string(line: str) -> str:
    return line.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def _word(root: str, body: str) -> str:
    return f'<w:{root} xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">{body}</w:{root}>'


def _paragraph(style: str, text: str) -> str:
    if "\t" in text:
        cells = "".join(f"<w:tc>{_paragraph('', cell)}</w:tc>" for cell in text.split("\t"))
        return f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>"
    properties = f'<w:pPr><w:pStyle w:val="H{style[-1]}"/></w:pPr>' if style else ""
    return f'<w:p>{properties}<w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'
