"""Tables of figures as plain text: `bench` and `eval` print them."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def table(title: str, columns: Iterable[str], *, n_left: int = 1) -> Table:
    """An empty table: the first `n_left` columns are words, aligned left; the others figures, aligned right."""
    made = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, header_style="")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < n_left else "right", no_wrap=True)
    return made


def to_text(parts: Iterable[RenderableType], *, width: int) -> str:
    """Tables and sentences one under another, without colours, no line longer than `width`."""
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False, emoji=False, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def size(n_tokens: int | None) -> str:
    """Tokens as people write them: 4k, 128k, 1m, or the plain number."""
    if n_tokens is None:
        return "-"
    for unit, name in ((1024 * 1024, "m"), (1024, "k")):
        if n_tokens >= unit and n_tokens % unit == 0:
            return f"{n_tokens // unit}{name}"
    return f"{n_tokens:,}"
