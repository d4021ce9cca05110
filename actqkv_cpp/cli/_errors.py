"""What the user is told when something fails: one table, one line of message, one line of hint."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from actqkv_cpp.errors import ActqkvError, ContextError, GpuMemoryError, InternalError, MemoryPlanError, ThreadError

if TYPE_CHECKING:
    from actqkv_cpp.cli._output import Output

FAILED = 1
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C

# First row that matches wins. "{}" is the exception's own text; a hint of None is the exception's own, or _HINT.
_HINT = "--help lists the options and their defaults"
_TABLE: tuple[tuple[type[BaseException], str, str | None], ...] = (
    (ContextError, "{}", "use a larger --ctx, a shorter document or a smaller --max-tokens"),
    (GpuMemoryError, "{}", None),
    (MemoryPlanError, "{}", "use a smaller --ctx or a shorter document, or free some memory"),
    (InternalError, "{}", "this is a defect of actqkv: please report it with the output of --verbose"),
    (ThreadError, "{}", "this is a defect of actqkv: please report it with the output of --verbose"),
    (ActqkvError, "{}", None),
    (MemoryError, "out of memory", "use a smaller --ctx or a smaller model"),
    (OSError, "{}", "check the path, its permissions and the space on its disk"),
    (Exception, "unexpected {kind}: {}", "this is a defect of actqkv: please report it with the output of --verbose"),
)

_OPTIONS = {
    "n_ctx": "--ctx",
    "n_sink": "--sink",
    "n_local": "--local",
    "n_chunk_tokens": "--chunk",
    "n_threads": "--threads",
    "kv_type": "--kv-type",
    "kv_file": "--kv-file",
    "max_tokens": "--max-tokens",
    "min_recall": "--min-recall",
    "vram": "--vram",
    "n_gpu_layers": "--gpu-layers",
    "budget": "--budget",
}
# A parameter's name, not part of a path; "budget", which is a word too, where its value is told.
_NAME = re.compile(
    r"(?<![\w./\\-])(?:" + "|".join(name for name in _OPTIONS if name != "budget") + r")(?![\w/\\-]|\.\w)"
    r"|(?<![\w./\\-])budget(?= (?:is |of )?\d| \()|(?<=smaller )budget\b"
)

# Messages about parameters that the command line lacks: what it says in their place, and its hint.
_TOLD: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"n_representatives is (\d+), expected 1 to (\d+)"),
        r"a chunk has \2 tokens, a summary of this method is made of \1 of them",
        "use a --chunk of at least that, for example 32",
    ),
    (
        re.compile(r"(.*): use positions 'clamped', or a smaller n_ctx"),
        r"\1",
        "use --method actqkv, which reads on beyond that, or a smaller --ctx",
    ),
    (re.compile("min_recall needs audits"), "min_recall needs audits", "add --audit 16: a check every 16 tokens"),
)


def explain(error: BaseException) -> tuple[str, str]:
    """Message and hint of an exception, each one line."""
    for kind, message, hint in _TABLE:
        if isinstance(error, kind):
            text = message.format(_text(error), kind=type(error).__name__)
            remedy = hint or getattr(error, "hint", None) or _HINT
            if isinstance(error, ActqkvError):
                text, remedy = (_as_options(line) for line in _told(text, remedy))
            return _one_line(text), _one_line(remedy)
    raise error


@contextmanager
def reported(output: Output) -> Iterator[None]:
    """Ends the command with a one-line error and a hint where the body fails, and with 130 where it is interrupted."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # whoever read the answers has left; the flush at exit must not fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        output.note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if type(error).__module__.startswith(("typer", "click")):  # usage errors, which Typer prints itself
            raise
        show(output, error)
        raise typer.Exit(FAILED) from None


def show(output: Output, error: Exception) -> None:
    """Print one error; with --verbose its traceback too."""
    if output.verbose:
        output.raw_error(traceback.format_exc())
    output.error(*explain(error))


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _told(text: str, hint: str) -> tuple[str, str]:
    """Message and hint without parameters that the command line lacks."""
    for pattern, told, its_hint in _TOLD:
        if found := pattern.fullmatch(text):
            return found.expand(told), its_hint
    return text, hint


def _as_options(text: str) -> str:
    """Parameters of the library by the names that they have on the command line."""
    return _NAME.sub(lambda found: _OPTIONS[found[0]], text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
