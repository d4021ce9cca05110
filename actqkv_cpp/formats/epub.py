"""EPUB: a zip of XHTML files in reading order; headings, else the contents, are anchors."""

from __future__ import annotations

import io
import posixpath
import zipfile
from urllib.parse import unquote
from xml.etree import ElementTree

from actqkv_cpp.errors import DocumentError
from actqkv_cpp.formats import html
from actqkv_cpp.formats.extract import Builder, Extract, one_line

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_TEXTS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")


def read(name: str, data: bytes) -> Extract:
    """The text of an EPUB, its files in the order of the spine, a blank line between them.

    Raises:
        DocumentError: the file is damaged, its text encrypted, or there is none.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = _book(name, archive)
    except DocumentError:
        raise
    except Exception as error:  # whatever a damaged file brings up: zipfile, zlib, expat, KeyError, ...
        raise DocumentError(
            f"{name} is a damaged EPUB: {one_line(error)}", "get it again, or convert it, for example with Calibre"
        ) from None
    if not found.text:
        raise DocumentError(f"{name} is an EPUB without text", "it needs at least a word")
    return found


def _book(name: str, archive: zipfile.ZipFile) -> Extract:
    container = ElementTree.fromstring(archive.read(_CONTAINER))
    package_path = _only(container, "rootfile").get("full-path", "")
    package = ElementTree.fromstring(archive.read(package_path))
    items = {item.get("id"): item for item in _all(package, "item")}
    spine = [items[ref.get("idref")] for ref in _all(package, "itemref")]
    paths = [_resolve(package_path, item) for item in spine if item.get("media-type") in _TEXTS]
    locked = _encrypted(archive)
    if any(path in locked for path in paths):
        raise DocumentError(
            f"{name} is an EPUB with copy protection (DRM)", "its text can be read only by the shop's own programs"
        )
    titles = _contents(archive, package_path, list(items.values()))
    builder = Builder()
    for path in paths:
        chapter = html.extract(name, html.decode(f"{path} in {name}", archive.read(path)))
        if not chapter.text:
            continue
        builder.gap(2)
        if not chapter.anchors:
            builder.anchor(titles.get(path, ""))
        builder.add(chapter)
    return builder.build()


def _contents(archive: zipfile.ZipFile, package_path: str, items: list[ElementTree.Element]) -> dict[str, str]:
    """File -> its title in the table of contents, of EPUB 3 (nav) or 2 (ncx); what cannot be read is left out."""
    titles: dict[str, str] = {}
    for item in items:
        nav = "nav" in (item.get("properties") or "").split()
        if not nav and item.get("media-type") != "application/x-dtbncx+xml":
            continue
        path = _resolve(package_path, item)
        try:
            root = ElementTree.fromstring(archive.read(path))
        except (ElementTree.ParseError, KeyError, ValueError):
            continue
        for entry in _all(root, "a" if nav else "navPoint"):
            target = entry if nav else _only(entry, "content")
            label = entry if nav else _only(entry, "text")
            file = _join(path, target.get("href" if nav else "src", ""))
            titles.setdefault(file, "".join(label.itertext()))
    return titles


def _encrypted(archive: zipfile.ZipFile) -> set[str]:
    if _ENCRYPTION not in archive.namelist():
        return set()
    root = ElementTree.fromstring(archive.read(_ENCRYPTION))
    return {unquote(reference.get("URI", "")) for reference in _all(root, "CipherReference")}


def _resolve(package_path: str, item: ElementTree.Element) -> str:
    return _join(package_path, item.get("href", ""))


def _join(base: str, href: str) -> str:
    """The archive's name of what a file in it refers to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(href.partition("#")[0])))


def _all(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return root.findall(f".//{{*}}{tag}")


def _only(root: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = root.find(f".//{{*}}{tag}")
    if found is None:
        raise ValueError(f"it has no {tag}")
    return found
