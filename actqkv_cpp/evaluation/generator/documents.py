"""Generate long documents with planted facts, and questions about them.

Tasks: passkey (a key in noise), number (ten digits), fact (one statement), multi (several attributes of one subject,
perhaps of a near twin too), json (rows of a table), twohop (through a relative), var (an alias of a variable; var3 two
aliases), list (several values at once), quote (repeat a sentence), absent (answered by "Not stated in the document.").

A seed gives the same text on every machine.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actqkv_cpp.evaluation.generator import filler
from actqkv_cpp.evaluation.generator.facts import (
    TASKS,
    Asked,
    Fact,
    FactSheet,
    Mention,
    listing,
    listing_starts,
)
from actqkv_cpp.evaluation.generator.source import Source

CHARS_PER_TOKEN = 3.0  # of the shipped tokenizer on such text, measured; used where no tokenizer is given
N_ATTEMPTS = 3000  # draws of facts after which a document takes what it has

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Copy:
    """`length` characters of an answer, from `start` on, that stand in the document from `at` on."""

    start: int
    at: int
    length: int


@dataclass(frozen=True)
class Question:
    """A question about a document; places are counted in characters of its text.

    Attributes:
        question: as a user would type it.
        answer: the exact words expected.
        depth: where in the document the last needed fact begins, 0 to 1; -1 where no fact states the answer.
        task: one of `TASKS`, or "var3".
        passages: (start, end) of each fact needed.
        copies: what of the answer stands in the document, word for word.
        bridges: (start, end) of what must be read first to know where the answer stands, in that order: the name of
            the sister whose town is asked for.
    """

    question: str
    answer: str
    depth: float
    task: str
    passages: tuple[tuple[int, int], ...] = ()
    copies: tuple[Copy, ...] = ()
    bridges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Document:
    """A generated document, its questions, and the styles of its filler."""

    text: str
    questions: tuple[Question, ...]
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Mix:
    """What a document is made of.

    Attributes:
        tasks: drawn from; evaluation asks for `count` questions of each.
        weights: odds of each task, where `count` is None; equal odds by default.
        density: share of the text that states facts, where `count` is None.
        count: at least so many questions per task, with everything else filler.
        heldout: draw names and places that training never draws.
        styles: styles of the filler, of `filler.STYLES`; one to three drawn at random by default.
        sentence_share: share of the questions about attributes and relations that ask for a whole sentence.
        repeat_chance: by which a digit of a long number repeats the one before.
    """

    tasks: Sequence[str] = TASKS
    weights: Sequence[float] | None = None
    density: float = 0.3
    count: int | None = None
    heldout: bool = False
    styles: Sequence[str] | None = None
    sentence_share: float = 0.0
    repeat_chance: float = 0.5

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks {list(self.tasks)}: expected some of {', '.join(TASKS)}")
        unknown = [style for style in self.styles or () if style not in filler.STYLES]
        if unknown:
            raise ValueError(f"styles {unknown}: expected some of {', '.join(sorted(set(filler.STYLES)))}")


def make_document(
    n_tokens: int,
    *,
    tasks: Sequence[str] = TASKS,
    seed: int | str = 0,
    heldout: bool = False,
    density: float = 0.3,
    count: int | None = None,
    styles: Sequence[str] | None = None,
    encode: Encode | None = None,
) -> Document:
    """A document of about `n_tokens` tokens with questions; equal arguments give equal documents.

    Args:
        n_tokens: wanted length, met within 1 % where facts leave room and `encode` is given.
        seed: any number or string.
        tasks: see `Mix`, as for the next four.
        heldout: draw names and places that training never draws.
        density: share of the text that states facts, where `count` is None.
        count: at least so many questions per task, with everything else filler.
        styles: styles of the filler.
        encode: text -> token ids, to fit the length; without it `CHARS_PER_TOKEN` is assumed.

    Raises:
        ValueError: an unknown task or style.

    Example:
        >>> document = make_document(2000, tasks=["passkey"], seed=1, count=3)
        >>> document.questions[0].answer in document.text
        True
    """
    mix = Mix(tasks=tuple(tasks), density=density, count=count, heldout=heldout, styles=styles)

    def build(n_chars: int) -> Document:
        return build_document(random.Random(f"doc-{seed}"), n_chars, mix)

    n_chars = int(n_tokens * CHARS_PER_TOKEN)
    document = build(n_chars)
    if encode is None:
        return document
    for _ in range(3):
        n_encoded = len(encode(document.text))
        if abs(n_encoded - n_tokens) < 0.01 * n_tokens:
            break
        n_chars = int(n_chars * n_tokens / n_encoded)
        document = build(n_chars)
    return document


def build_document(rng: random.Random, n_chars: int, mix: Mix) -> Document:
    """A document of about `n_chars` characters, longer where the facts alone are; `rng` is drawn from."""
    source = Source(rng, heldout=mix.heldout)
    sheet = _plant_facts(source, n_chars, mix)
    n_styles = rng.choice((1, 2, 3))
    styles = rng.sample(filler.STYLES, n_styles)
    if mix.styles is not None:
        styles = list(mix.styles)
    filling = _write_filler(source, styles, max(0, n_chars - sheet.n_chars))
    items = _scatter(rng, filling, _order_facts(rng, sheet.facts))
    text, starts = _join(rng, items)
    questions = [_locate(asked, sheet.facts, starts, len(text)) for asked in sheet.asked]
    rng.shuffle(questions)
    return Document(text, tuple(questions), tuple(styles))


@dataclass(frozen=True)
class _Item:
    """A piece of the text; `fact` is its index among the facts, None for filler."""

    text: str
    own_line: bool
    fact: int | None = None


def _plant_facts(source: Source, n_chars: int, mix: Mix) -> FactSheet:
    sheet = FactSheet(source, sentence_share=mix.sentence_share, repeat_chance=mix.repeat_chance)
    for _ in range(N_ATTEMPTS):
        task = _next_task(source, sheet, n_chars, mix)
        if task is None:
            break
        sheet.plant(task)
    return sheet


def _next_task(source: Source, sheet: FactSheet, n_chars: int, mix: Mix) -> str | None:
    """The task to plant next: by odds up to the density, or the first that lacks questions, "absent" last."""
    if mix.count is None:
        return source.rng.choices(mix.tasks, mix.weights)[0] if sheet.n_chars < n_chars * mix.density else None
    n_asked = Counter(asked.task for asked in sheet.asked)
    lacking = [task for task in mix.tasks if n_asked[task] < mix.count]
    return min(lacking, key=lambda task: task == "absent", default=None)


def _write_filler(source: Source, styles: Sequence[str], n_chars: int) -> list[_Item]:
    items: list[_Item] = []
    n_written = 0
    while n_written < n_chars:
        style = source.pick(styles)
        for _ in range(source.rng.choice((1, 2, 4, 6))):
            item = _Item(filler.sentence(source, style), own_line=style in filler.OWN_LINE_STYLES)
            items.append(item)
            n_written += len(item.text) + 1
            if n_written >= n_chars:
                break
    return items


def _order_facts(rng: random.Random, facts: Sequence[Fact]) -> list[_Item]:
    """The facts in random order: one by one, or in small groups that stay together (tables, biographies)."""
    items = [_Item(fact.text, fact.own_line, index) for index, fact in enumerate(facts)]
    if rng.random() < 0.6:
        rng.shuffle(items)
        return items
    groups: list[list[_Item]] = []
    start = 0
    while start < len(items):
        size = rng.choice((1, 3, 6, 10))
        groups.append(items[start : start + size])
        start += size
    rng.shuffle(groups)
    return [item for group in groups for item in group]


def _scatter(rng: random.Random, filling: list[_Item], facts: list[_Item]) -> list[_Item]:
    """The facts, in their order, at random places of the filler: anywhere, or (30 %) clustered at few places."""
    if not facts:
        return filling
    clustered = rng.random() < 0.3
    n_places = max(1, len(facts) // 4) if clustered else len(facts)
    places = sorted(rng.randrange(len(filling) + 1) for _ in range(n_places))
    if clustered:
        places = sorted(rng.choice(places) for _ in facts)
    items: list[_Item] = []
    previous = 0
    for fact, place in zip(facts, places, strict=True):
        items += [*filling[previous:place], fact]
        previous = place
    return items + filling[previous:]


def _join(rng: random.Random, items: Sequence[_Item]) -> tuple[str, dict[int, int]]:
    """The text, and for each fact the character that it starts at."""
    paragraph = rng.choice(("\n", "\n\n", " ", "\n"))
    paragraph_chance = rng.choice((0.05, 0.15, 0.3))
    parts: list[str] = []
    starts: dict[int, int] = {}
    n_chars = 0
    previous: _Item | None = None
    for item in items:
        if previous is None:
            separator = ""
        elif item.own_line or previous.own_line:
            separator = "\n"
        else:
            separator = paragraph if rng.random() < paragraph_chance else " "
        if item.fact is not None:
            starts[item.fact] = n_chars + len(separator)
        parts += [separator, item.text]
        n_chars += len(separator) + len(item.text)
        previous = item
    return "".join(parts), starts


def _locate(asked: Asked, facts: Sequence[Fact], starts: dict[int, int], n_chars: int) -> Question:
    """A question whose facts have a place in the text."""

    def place(mention: Mention) -> tuple[int, int]:
        return starts[mention.fact] + mention.start, starts[mention.fact] + mention.end

    answer = asked.answer
    read = [(reading.start, *place(reading.mention)) for reading in asked.readings]
    if asked.in_text_order:
        mentions = sorted((reading.mention for reading in asked.readings), key=place)
        values = [facts[mention.fact].text[mention.start : mention.end] for mention in mentions]
        answer = listing(values)
        read = [(start, *place(mention)) for start, mention in zip(listing_starts(values), mentions, strict=True)]
    depth = max(starts[fact] for fact in asked.facts) / max(1, n_chars) if asked.facts else -1.0
    return Question(
        asked.question,
        answer,
        round(depth, 4),
        asked.task,
        passages=tuple((starts[fact], starts[fact] + len(facts[fact].text)) for fact in asked.facts),
        copies=tuple(Copy(start, at, end - at) for start, at, end in read),
        bridges=tuple(place(mention) for mention in asked.bridges),
    )


def at_most(questions: Sequence[Question], count: int | None) -> list[Question]:
    """The first `count` questions of each task, all of them for None."""
    if count is None:
        return list(questions)
    n_kept: Counter[str] = Counter()
    kept = []
    for question in questions:
        n_kept[question.task] += 1
        if n_kept[question.task] <= count:
            kept.append(question)
    return kept
