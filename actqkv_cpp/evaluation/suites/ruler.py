"""ruler: the eight tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no download, in turn.

Prompts, sizes and metric are RULER's, with three differences: the prompt is split where the document ends, the
beginning of the answer that RULER puts into the model's mouth is left out (chat templates have no place for it), and
the hay of multivalue and multiquery is RULER's noise, since its essays are a download.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.generator.lexicon import WORDS
from actqkv_cpp.evaluation.samples import Draft, Question, Room, Sample, Suite
from actqkv_cpp.evaluation.suites.retrieve import NOISE

_SHORT_CTX = 4096  # below it, word lists repeat their words less often
_N_HOPS = 4
_N_COMMON = 10
_ZETA_2 = math.pi**2 / 6


@dataclass(frozen=True)
class _Task:
    """One of the eight: makes a draft of so many pieces of hay, and how many tokens its answer may take."""

    name: str
    make: Callable[[Room, random.Random, int], Draft]
    max_tokens: int


# ---- needles


def niah_draft(
    rng: random.Random,
    n_hay: int,
    *,
    n_values: int = 1,
    n_queries: int = 1,
    hay: str = "noise",
    kind: str = "numbers",
    apart: bool = False,
) -> Draft:
    """Needles in noise, or in a hay of other needles, or of needles whose keys and values are UUIDs.

    Args:
        rng: drawn from.
        n_hay: lines of hay.
        n_values: of a key.
        n_queries: keys asked for.
        hay: "noise" or "needles".
        kind: of the values, "numbers" or "uuids".
        apart: ask for each key in a question of its own.
    """
    keys: dict[str, list[str]] = {}
    while len(keys) < n_queries:
        keys[_key(rng, kind)] = [_value(rng, kind) for _ in range(n_values)]
    lines = [NOISE.rstrip()] * n_hay
    if hay == "needles":
        lines = [_needle(kind, key, _value(rng, kind)) for key in _other_keys(rng, kind, n_hay, taken=keys)]
    needles = [_needle(kind, key, value) for key, values in keys.items() for value in values]
    for needle in rng.sample(needles, len(needles)):
        lines.insert(rng.randrange(len(lines) + 1), needle)

    one = n_values * n_queries == 1
    what = kind.removesuffix("s") if one else kind
    text = f"{'A' if one else 'Some'} special magic {what} {'is' if one else 'are'} hidden within the following text. "
    text += f"Make sure to memorize it. I will quiz you about the {what} afterwards.\n"
    text += "\n".join(lines) + "\n"
    groups = [[key] for key in keys] if apart else [list(keys)]
    return Draft(text, tuple(_asked(text, {key: keys[key] for key in group}, kind) for group in groups))


def _asked(text: str, keys: dict[str, list[str]], kind: str) -> Question:
    """The question for all values of `keys`."""
    needles = [_needle(kind, key, value) for key, values in keys.items() for value in values]
    places = tuple((at, at + len(needle)) for needle in needles for at in [text.index(needle)])
    one = len(needles) == 1
    asked = list(keys)
    named = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    what = f"is the special magic {kind.removesuffix('s')}" if one else f"are all the special magic {kind}"
    return Question(
        text=f"What {what} for {named} mentioned in the provided text?",
        references=tuple(value for values in keys.values() for value in values),
        depth=places[0][0] / len(text) if one else None,
        needles=places,
    )


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _key(rng: random.Random, kind: str) -> str:
    return _value(rng, kind) if kind == "uuids" else "-".join(rng.sample(WORDS, 2))


def _value(rng: random.Random, kind: str) -> str:
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randrange(10**6, 10**7))


def _other_keys(rng: random.Random, kind: str, n: int, *, taken: dict[str, list[str]]) -> list[str]:
    """`n` keys, none of them taken. Pairs of words may repeat, as they do in RULER."""
    keys: list[str] = []
    while len(keys) < n:
        key = _key(rng, kind)
        if key not in taken:
            keys.append(key)
    return keys


# ---- a chain of variables

_VARIABLES = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_ASKED = "Question: Find all variables that are assigned the value {} in the text above."
_ANSWERED = (
    " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the value "
    "{}, they are: {}\n\n"
)


def _variables(room: Room, rng: random.Random, n_hay: int) -> Draft:
    shown, value, names, _ = _chain(rng, n_lines=5, n_letters=3)
    example = _VARIABLES + shown + "\n" + _ASKED.format(value) + _ANSWERED.format(len(names), value, " ".join(names))
    hay, value, names, places = _chain(rng, n_lines=max(n_hay, _N_HOPS + 1), n_letters=5)
    head = example + _VARIABLES
    needles = tuple((len(head) + begin, len(head) + end) for begin, end in places)
    question = Question(text=_ASKED.format(value), references=tuple(names), needles=needles)
    return Draft(head + hay + "\n", (question,))


def _chain(
    rng: random.Random, *, n_lines: int, n_letters: int
) -> tuple[str, str, list[str], tuple[tuple[int, int], ...]]:
    """Noise with a chain of assignments in it, in order; the value, the names that have it, and where they get it."""
    names: list[str] = []
    while len(names) <= _N_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=n_letters))
        names += [name] if name not in names else []
    value = str(rng.randrange(10000, 100000))
    steps = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    lines = [NOISE.rstrip()] * n_lines
    for shift, (place, step) in enumerate(zip(sorted(rng.sample(range(n_lines), len(steps))), steps, strict=True)):
        lines.insert(place + shift, step)
    text = "\n".join(lines)
    return text, value, names, tuple((at, at + len(step)) for step in steps for at in [text.index(step + "\n")])


# ---- words

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_COMMON_ASKED = "Question: What are the 10 most common words in the above list?"
_COMMON_ANSWERED = " Answer: The top 10 words that appear most often in the list are: {}\n"
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_FREQUENT_ASKED = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)


def _common_words(room: Room, rng: random.Random, n_hay: int) -> Draft:
    """Ten words 30 times each among words that appear 3 times, behind a small example of the same."""
    short = room.n_ctx < _SHORT_CTX
    example, answer = _word_list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    text, common = _word_list(rng, _N_COMMON + n_hay, *((6, 1) if short else (30, 3)))
    head = _COMMON + example + "\n" + _COMMON_ASKED
    head += _COMMON_ANSWERED.format(" ".join(f"{i}. {word}" for i, word in enumerate(answer, 1)))
    return Draft(head + _COMMON + text + "\n", (Question(text=_COMMON_ASKED, references=tuple(common)),))


def _word_list(rng: random.Random, n_words: int, n_common: int, n_uncommon: int) -> tuple[str, list[str]]:
    words = rng.sample(_vocabulary(n_words), n_words)
    common, others = words[:_N_COMMON], words[_N_COMMON:]
    listed = common * n_common + others * n_uncommon
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


@cache
def _vocabulary(n: int) -> Sequence[str]:
    """At least `n` words: the generator's, then compounds of two of them."""
    words = list(dict.fromkeys(word.lower() for word in WORDS))
    compounds = (a + b for a in words for b in words if a != b)
    return words if n <= len(words) else [*words, *(next(compounds) for _ in range(n - len(words)))]


def _frequent_words(room: Room, rng: random.Random, n_hay: int) -> Draft:
    """Coded words whose number falls with the square of their rank; the first rank is dots, to be ignored."""
    vocabulary = ["..."]
    while len(vocabulary) < max(room.n_ctx // 50, 10):
        vocabulary.append("".join(rng.choices(string.ascii_lowercase, k=6)))
    words = [w for rank, w in enumerate(vocabulary, 1) for _ in range(int(n_hay / (rank * rank * _ZETA_2)))]
    rng.shuffle(words)
    question = Question(text=_FREQUENT_ASKED, references=tuple(vocabulary[1:4]))
    return Draft(_FREQUENT + " ".join(words) + "\n", (question,))


# ---- the suite


def _niah(**options: Any) -> Callable[[Room, random.Random, int], Draft]:
    return lambda room, rng, n_hay: niah_draft(rng, n_hay, **options)


TASKS = (
    _Task("niah_single", _niah(), 128),
    _Task("niah_multikey", _niah(hay="needles"), 128),
    _Task("niah_multikey_uuid", _niah(hay="needles", kind="uuids"), 128),
    _Task("niah_multivalue", _niah(n_values=4), 128),
    _Task("niah_multiquery", _niah(n_queries=4), 128),
    _Task("variable_tracking", _variables, 30),
    _Task("common_words", _common_words, 120),
    _Task("frequent_words", _frequent_words, 50),
)


def _ruler(room: Room, index: int) -> Sample:
    task = TASKS[index % len(TASKS)]
    draft = room.fit(lambda n_hay: _named(task, task.make(room, room.rng(index), n_hay)), task.max_tokens)
    return room.sample(draft, task.max_tokens)


def _named(task: _Task, draft: Draft) -> Draft:
    """The draft with its questions filed under the task."""
    questions = (
        Question(text=q.text, references=q.references, depth=q.depth, needles=q.needles, task=task.name)
        for q in draft.questions
    )
    return Draft(draft.document, tuple(questions))


SUITE = Suite(
    name="ruler",
    about="RULER's eight tasks that need no download, in turn; share of the references contained",
    n_samples=3 * len(TASKS),
    make=_ruler,
    score=lambda question, said: metrics.share_contained(said, question.references),
)
