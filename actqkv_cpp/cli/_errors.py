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
    "budget": "--budget",
    "n_sink": "--sink",
    "n_local": "--local",
    "n_chunk_tokens": "--chunk",
    "n_threads": "--threads",
    "kv_type": "--kv-type",
    "max_tokens": "--max-tokens",
    "vram": "--vram",
    "n_gpu_layers": "--gpu-layers",
}


def explain(error: BaseException) -> tuple[str, str]:
    """Message and hint of an exception, each one line."""
    for kind, message, hint in _TABLE:
        if isinstance(error, kind):
            text = message.format(_text(error), kind=type(error).__name__)
            return _one_line(_as_options(text)), _one_line(hint or _as_options(getattr(error, "hint", None) or _HINT))
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


def _as_options(text: str) -> str:
    """Parameters of the library by the names that they have on the command line."""
    return re.sub(r"\b(" + "|".join(_OPTIONS) + r")\b", lambda found: _OPTIONS[found[0]], text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
