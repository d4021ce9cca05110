"""Text between the facts: sentences in several styles, none of which mentions anything that a question may be about."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from actqkv_cpp.evaluation.generator.lexicon import ADJECTIVES, ADVERBS, OBJECTS, ROLES, SPOTS, TIMES, VERBS, WORDS
from actqkv_cpp.evaluation.generator.source import Source, capitalised
from actqkv_cpp.evaluation.generator.templates import ABOUT_OBJECT, COUNTS, NOISE, PROSE

_ARTICLE = re.compile(r"\b([Aa])(?= [aeiou])")  # where "an" belongs
_LOG_LEVELS = ("INFO", "WARN", "ERROR", "DEBUG")


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
        text = _ARTICLE.sub(r"\1n", _WRITERS[style](source))
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


def _counts(source: Source) -> str:
    pick, draw = source.pick, source.rng.randrange
    slots = {
        "year": str(draw(1600, 2100)),
        "year2": str(draw(1600, 2100)),
        "n": str(draw(10, 900)),
        "n2": str(draw(100, 9000)),
        "small": str(draw(2, 60)),
        "hour": f"{draw(24):02d}",
        "minute": f"{draw(60):02d}",
        "role": pick(ROLES),
        "spot": pick(SPOTS),
        "spot2": pick(SPOTS),
        "time": pick(TIMES),
        "object": pick(OBJECTS),
        "adjective": pick(ADJECTIVES),
        "verb": pick(VERBS),
    }
    return pick(COUNTS).format(**slots)


def _noise(source: Source) -> str:
    return source.pick(NOISE)


_WRITERS: dict[str, Callable[[Source], str]] = {
    "prose": _prose,
    "people": _people,
    "counts": _counts,
    "noise": _noise,
    "log": _log,
    "words": _words,
}
STYLES = (
    "prose",
    "prose",
    "prose",
    "people",
    "counts",
    "noise",
    "log",
    "words",
)  # prose is drawn three times as often
OWN_LINE_STYLES = frozenset({"log"})
