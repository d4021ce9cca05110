"""Text between the facts: sentences in several styles, none of which mentions anything that a question may be about."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from models.lexicon import ADJECTIVES, ADVERBS, OBJECTS, ROLES, SPOTS, TIMES, VERBS, WORDS, word_list
from models.source import Source, capitalised
from models.templates import ABOUT_OBJECT, NOISE, PROSE

_LOG_LEVELS = ("INFO", "WARN", "ERROR", "DEBUG")
_DOCUMENTED_MODULES = word_list("""
    argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv ctypes datetime
    decimal difflib dis doctest email enum fractions functools gettext glob gzip hashlib heapq http.client http.server
    imaplib inspect io ipaddress json logging mailbox multiprocessing netrc optparse os pathlib pickle platform poplib
    pprint queue random re sched selectors shelve shlex shutil smtplib socket sqlite3 ssl statistics string subprocess
    tarfile tempfile textwrap threading timeit tkinter traceback turtle typing unittest urllib.request uuid warnings
    weakref xml.dom zipfile
""")


def object_sentence(source: Source, phrase: str, templates: Sequence[str] = ABOUT_OBJECT) -> str:
    """A sentence about the object that `phrase` names."""
    pick = source.pick
    template = pick(templates)
    slots = {
        "spot": pick(SPOTS),
        "time": pick(TIMES),
        "role": pick(ROLES),
        "verb": pick(VERBS),
        "place": source.place(),
        "person": source.person(),
        "adjective": pick(ADJECTIVES),
        "word": pick(WORDS),
        "adverb": pick(ADVERBS),
        "object2": pick(OBJECTS),
    }
    return capitalised(template.format(object=phrase, **slots))


def sentence(source: Source, style: str) -> str:
    """A sentence (or a log line) in one of `STYLES` that mentions no claimed object."""
    while True:
        text = _WRITERS[style](source)
        if not any(phrase in text for phrase in source.claimed_objects):
            return text


def _prose(source: Source) -> str:
    pick = source.pick
    template = pick(PROSE)
    slots = {
        "adjective": pick(ADJECTIVES),
        "adjective2": pick(ADJECTIVES),
        "role": pick(ROLES),
        "role2": pick(ROLES),
        "object": pick(OBJECTS),
        "object2": pick(OBJECTS),
        "verb": pick(VERBS),
        "spot": pick(SPOTS),
        "spot2": pick(SPOTS),
        "adverb": pick(ADVERBS),
        "time": pick(TIMES),
    }
    return template.format(**slots)


def _people(source: Source) -> str:
    return object_sentence(source, source.object_phrase())


def _log(source: Source) -> str:
    hour, minute, second = source.rng.randrange(24), source.rng.randrange(60), source.rng.randrange(60)
    start = f"{source.pick(_LOG_LEVELS)} {source.pick(WORDS)}: {source.pick(VERBS)}"
    details = (str(source.rng.randrange(1000)), source.pick(OBJECTS), source.hex_digits(6))
    return f"{hour:02d}:{minute:02d}:{second:02d} {start} {source.pick(details)}"


def _words(source: Source) -> str:
    n_words = source.rng.randrange(6, 16)
    return " ".join(source.pick(WORDS) for _ in range(n_words)) + "."


def _docstring(source: Source) -> str:
    return source.pick(docstring_sentences())


@cache
def docstring_sentences() -> tuple[str, ...]:
    """Plain sentences from the docstrings of the Python that runs this, sorted: they differ from version to version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # old members of these modules warn when they are looked at
        found = {text for docstring in _docstrings() for text in _plain_sentences(docstring)}
    return tuple(sorted(found))


def _docstrings() -> Iterator[str]:
    for name in _DOCUMENTED_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # an optional part of the standard library, such as tkinter
            continue
        members = (getattr(module, member, None) for member in sorted(dir(module)) if not member.startswith("_"))
        for documented in (module, *members):
            docstring = getattr(documented, "__doc__", None)
            if isinstance(docstring, str):
                yield docstring


def _plain_sentences(docstring: str) -> Iterator[str]:
    for piece in re.split(r"(?<=\.)\s+|\n\s*\n", docstring):
        text = " ".join(piece.split())
        if 25 < len(text) < 220 and text.isascii() and text[0].isupper() and text.endswith(".") and ">>>" not in text:
            yield text


def _noise(source: Source) -> str:
    return source.pick(NOISE)


_WRITERS: dict[str, Callable[[Source], str]] = {
    "prose": _prose,
    "people": _people,
    "docstring": _docstring,
    "noise": _noise,
    "log": _log,
    "words": _words,
}
STYLES = (
    "prose",
    "prose",
    "prose",
    "people",
    "docstring",
    "noise",
    "log",
    "words",
)  # prose is drawn three times as often
OWN_LINE_STYLES = frozenset({"log"})
