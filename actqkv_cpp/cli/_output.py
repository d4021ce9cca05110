"""The one sink of all commands: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from actqkv_cpp.files import named
from actqkv_cpp.results import Answer, Source

_PLAIN_PROGRESS_S = 10.0  # between two lines of progress where standard error is not a terminal
_RATE_SPAN_S = 5.0  # the rate shown is over the last seconds: reading slows down as a context fills
_BAR, _NAME = 20, 12  # columns of the bar, and the fewest for what is going on

# Control characters of a document or a model must not steer the terminal; newline and tab may pass.
_NO_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}

Progress = Callable[[int, int], object]


class Update(Protocol):
    """Takes how far something is and, where that changes, what is going on."""

    def __call__(self, done: int, total: int, what: str | None = None) -> object: ...


class Output:
    """Where a command writes.

    Args:
        quiet: no notes and no progress.
        verbose: errors come with their traceback.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a character that the locale lacks becomes "?", never an exception
                stream.reconfigure(errors="replace")
        self.quiet = quiet
        self.verbose = verbose
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._err.soft_wrap = not self._err.is_terminal  # lines of a log stay whole

    # -- standard output

    def data(self, text: str) -> None:
        """A piece of an answer, shown at once."""
        self._write(text.translate(_NO_CONTROL) if sys.stdout.isatty() else text)

    def line(self, text: str = "") -> None:
        self.data(text + "\n")

    def json(self, value: Any) -> None:
        """One JSON object; in a locale that is not UTF-8 other characters are escaped, which is JSON all the same."""
        unicode = _is_utf8(sys.stdout)
        self._write(json.dumps(value, ensure_ascii=not unicode, indent=2) + "\n")

    def _write(self, text: str) -> None:
        with named("standard output"):
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows pieces of one answer; ends the line however the answer ends."""
        shown = False

        def show(piece: str) -> None:
            nonlocal shown
            shown = True
            self.data(piece)

        try:
            yield show
        finally:
            if shown:
                self.line()

    def sources(self, sources: Sequence[Source]) -> None:
        """Passages, best first: document and character offsets, place, share of the attention, text."""
        for rank, source in enumerate(sources, 1):
            place = f", {source.place}" if source.place else ""
            self.line(f"[{rank}] {source.document}:{source.start}-{source.end}{place} ({source.score:.0%})")
            self.entry("    ", " ".join(source.text.split()))

    def entry(self, head: str, text: str) -> None:
        """A line of `head` and text; what a terminal has no room for goes below it, whole words, indented."""
        line = head + text
        if sys.stdout.isatty():
            width = max(shutil.get_terminal_size().columns, 20)
            indent = " " * min(len(head), width // 4)
            line = textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent)
        self.line(line)

    # -- standard error

    def note(self, text: str) -> None:
        """What is good to know; dim on a terminal."""
        if not self.quiet:
            self._err.print(Text(text.translate(_NO_CONTROL), style="dim"))

    def answer_note(self, answer: Answer) -> None:
        """Says so where an answer did not end by itself."""
        if answer.context_full:
            self.note("the context is full: start again with a larger --ctx, or go on with /reset in a chat")
        elif answer.finish_reason == "length":
            self.note(f"cut at {answer.usage.completion_tokens:,} tokens: --max-tokens allows more")
        elif answer.finish_reason == "cancelled":
            self.note("stopped")

    def error(self, message: str, hint: str) -> None:
        self._err.print(Text.assemble(("error: ", "bold red"), message.translate(_NO_CONTROL)))
        self._err.print(Text.assemble(("hint: ", "bold"), hint.translate(_NO_CONTROL)))

    def raw_error(self, text: str) -> None:
        self._err.print(Text(text))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows that something without a known end goes on."""
        if self.quiet or not self._err.is_terminal:
            yield
            return
        spinner = Spinner("line", Text(what, style="dim"))
        with Live(spinner, console=self._err, transient=True, refresh_per_second=10):
            yield

    @contextmanager
    def progress(self, what: str, unit: str = "tokens", *, rate_span_s: float = _RATE_SPAN_S) -> Iterator[Update]:
        """Yields a function of (done, total) that shows how far something is, its rate and the time left.

        Args:
            rate_span_s: the rate shown is over the last so many seconds.
        """
        meter = Meter(what, unit, rate_span_s)
        if self.quiet:
            yield meter.update
        elif self._err.is_terminal:
            with Live(meter, console=self._err, transient=True, refresh_per_second=8):
                yield meter.update
        else:
            yield self._plain_progress(meter)

    def _plain_progress(self, meter: Meter) -> Update:
        """For logs: a line now and then."""
        shown_at = time.monotonic()

        def update(done: int, total: int, what: str | None = None) -> None:
            nonlocal shown_at
            meter.update(done, total, what)
            if time.monotonic() - shown_at >= _PLAIN_PROGRESS_S:
                shown_at = time.monotonic()
                self.note(f"{meter.what}: {meter.text()}")

        return update


class Meter:
    """How far something is: done, total, rate over the last seconds, time left."""

    def __init__(self, what: str, unit: str, rate_span_s: float = _RATE_SPAN_S) -> None:
        self.what = what
        self.unit = unit
        self._rate_span_s = rate_span_s
        self.done = self.total = 0
        self._spinner = Spinner("line", style="dim")
        self._history: list[tuple[float, int]] = []

    def update(self, done: int, total: int, what: str | None = None) -> None:
        now = time.monotonic()
        self.done, self.total = done, total
        self.what = what or self.what
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[1][0] > self._rate_span_s:
            self._history.pop(0)

    def rate(self) -> float:
        """Per second; 0 while unknown."""
        if len(self._history) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._history[0], self._history[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def text(self, width: int | None = None) -> str:
        """Done of total, rate and time left, as far as they fit `width`."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if rate := self.rate():
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        while width is not None and len(parts) > 1 and len(", ".join(parts)) > width:
            parts.pop()
        return ", ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line that fits the terminal: the bar gives way first, then the name, then the time left."""
        width = options.max_width - 1
        if not self.total:
            self._spinner.update(text=Text(shorten(self.what, width - 2), style="dim"))
            yield self._spinner
            return
        status = self.text(width)
        room = width - len(status) - 1
        row = Table.grid(padding=(0, 1, 0, 0))
        cells: list[RenderableType] = [Text(shorten(status, width), style="dim", no_wrap=True)]
        if room >= _BAR + _NAME + 1:
            cells.insert(0, ProgressBar(total=max(self.total, 1), completed=self.done, width=_BAR))
            room -= _BAR + 1
        if room >= _NAME:
            cells.insert(0, Text(shorten(self.what, room), no_wrap=True))
        row.add_row(*cells)
        yield row


def answer_figures(answer: Answer) -> list[str]:
    """Tokens, bytes and speeds of one answer."""
    usage, timing, memory = answer.usage, answer.timing, answer.memory
    total = usage.prompt_tokens + usage.completion_tokens
    audit = [] if answer.audit is None else [f"audit: {answer.audit}"]
    gpu = [] if answer.gpu is None else [f"GPU: {answer.gpu}"]
    dense = f", {usage.dense_tokens:,} in the method's dense layers" if usage.dense_tokens else ""
    return [
        f"last answer: {usage.completion_tokens:,} tokens, first after {timing.first_token_s:.2f} s, "
        f"then {timing.decode_tokens_per_s:,.1f}/s",
        f"attended: at most {usage.attended_tokens:,} of {total:,} tokens at a time{dense}",
        f"memory: {human_bytes(memory.kv_bytes)} of KV, {human_bytes(memory.summary_bytes)} of summaries",
        *gpu,
        *audit,
    ]


def human_bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."[:width]


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "") in ("utf8", "utf8sig")
