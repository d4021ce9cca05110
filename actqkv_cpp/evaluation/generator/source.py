"""Random draws for one document: words, names, values, subjects."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from actqkv_cpp.evaluation.generator import lexicon
from actqkv_cpp.evaluation.generator.lexicon import ADJECTIVES, OBJECTS, ROLES, WORDS

T = TypeVar("T")


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case and the rest unchanged."""
    return text[0].upper() + text[1:]


def with_article(phrase: str) -> str:
    """ "a lamp", "an old lamp"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class Source:
    """One document's stream of random draws.

    The text of a seed, and with it the shipped held-out sets, depends on the number and order of the draws.

    Args:
        rng: the generator drawn from; shared with the caller.
        heldout: draw names and places from the held-out part of the lexicon instead of the training part.
    """

    def __init__(self, rng: random.Random, *, heldout: bool = False) -> None:
        self.rng = rng
        self.heldout = heldout
        self.claimed_objects: set[str] = set()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One item, for exactly one draw (unlike `random.Random.choice`)."""
        return items[int(self.rng.random() * len(items))]

    # names

    def first_name(self) -> str:
        return self._name(lexicon.first_names())

    def surname(self) -> str:
        return self._name(lexicon.surnames())

    def place(self) -> str:
        return self._name(lexicon.places())

    def person(self) -> str:
        if self.chance(0.8):
            return f"{self.first_name()} {self.surname()}"
        return self.first_name()

    def _name(self, names: tuple[str, ...]) -> str:
        n_training = lexicon.n_training(names)
        index = int(self.rng.random() * n_training)
        return names[n_training + index % (len(names) - n_training)] if self.heldout else names[index]

    # things

    def object_phrase(self) -> str:
        """An adjective and an object: "rusty lantern"."""
        return f"{self.pick(ADJECTIVES)} {self.pick(OBJECTS)}"

    def claimed_object(self) -> str:
        """An object phrase that a question may be about: filler must not mention it (`claimed_objects`)."""
        phrase = self.object_phrase()
        self.claimed_objects.add(phrase)
        return phrase

    def subject(self) -> str:
        """Somebody or something that can have attributes, as a noun phrase."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.person()
        if kind < 0.6:
            return f"the {self.pick(ROLES)} {self.pick(('in', 'of', 'from'))} {self.place()}"
        if kind < 0.8:
            return f"the {self.claimed_object()}"
        if kind < 0.86:
            return f"Project {self.place()}"
        if kind < 0.92:
            return self.pick(("room ", "order #", "flat ", "vehicle ", "parcel ", "unit ")) + self.digits((3, 4))
        return f"the {self.claimed_object()} from {self.place()}"

    def key_name(self) -> str:
        """What a pass key may be for: a word, a place, or two words."""
        if self.chance(0.4):
            return self.pick(WORDS)
        if self.chance(0.6):
            return self.place()
        return f"{self.pick(ADJECTIVES)}-{self.pick(WORDS)}"

    # values

    def digits(self, n_digits: int | Sequence[int]) -> str:
        """A number of `n_digits` digits, or of one of those counts of digits; never with a leading zero."""
        n = n_digits if isinstance(n_digits, int) else self.pick(n_digits)
        return str(self.rng.randrange(10 ** (n - 1), 10**n))

    def repetitive_digits(self, n_digits: int, *, chance: float) -> str:
        """A number in which a digit repeats the one before by `chance`, or by accident."""
        digits = self.pick("123456789")
        while len(digits) < n_digits:
            digits += digits[-1] if self.chance(chance) else self.pick("0123456789")
        return digits

    def hex_digits(self, n_digits: int | Sequence[int]) -> str:
        n = n_digits if isinstance(n_digits, int) else self.pick(n_digits)
        return self.letters("0123456789abcdef", n)

    def letters(self, alphabet: str, n: int) -> str:
        return "".join(self.pick(alphabet) for _ in range(n))

    def value(self, kind: str) -> str:
        """A random value of one of `VALUE_KINDS`."""
        return VALUE_KINDS[kind](self)


def _phrase(source: Source) -> str:
    n_words = source.pick((2, 3, 3, 4))
    return " ".join(source.pick(WORDS) for _ in range(n_words))


def _colour(source: Source) -> str:
    if source.chance(0.5):
        return f"{source.pick(ADJECTIVES)} {source.pick(lexicon.COLOURS)}"
    return source.pick(lexicon.COLOURS)


def _date(source: Source) -> str:
    date = f"{source.rng.randrange(1, 29)} {source.pick(lexicon.MONTHS)}"
    return f"{date} {source.rng.randrange(1600, 2100)}" if source.chance(0.3) else date


VALUE_KINDS: dict[str, Callable[[Source], str]] = {
    "number": lambda s: s.digits((3, 4, 4, 5, 5, 6, 7)),
    "small number": lambda s: s.digits(2),
    "year": lambda s: s.digits(4),
    "word": lambda s: s.pick(WORDS),
    "phrase": _phrase,
    "code": lambda s: f"{s.letters('ABCDEFGHJKLMNPQRSTUVWXYZ', 2)}-{s.digits((2, 3, 4))}",
    "hex": lambda s: s.hex_digits((4, 6, 8)),
    "colour": _colour,
    "dish": lambda s: f"{s.pick(ADJECTIVES)} {s.pick(lexicon.DISHES)}",
    "instrument": lambda s: f"the {s.pick(lexicon.INSTRUMENTS)}",
    "animal": lambda s: with_article(f"{s.pick(ADJECTIVES)} {s.pick(lexicon.ANIMALS)}"),
    "place": Source.place,
    "person": Source.person,
    "time": lambda s: f"{s.rng.randrange(24):02d}:{s.rng.randrange(60):02d}",
    "date": _date,
    "weight": lambda s: f"{s.rng.randrange(2, 900)} kg",
    "height": lambda s: f"{s.rng.randrange(20, 400)} cm",
    "coins": lambda s: f"{s.rng.randrange(10, 9999)} coins",
    "seat": lambda s: f"{s.rng.randrange(1, 80)}{s.pick('ABCDEFGH')}",
    "address": lambda s: f"{s.rng.randrange(1, 300)} {s.place()} Street",
    "object": lambda s: with_article(s.object_phrase()),
}
