"""Facts and the questions about them: one method of `FactSheet` per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actqkv_cpp.evaluation.generator.filler import object_sentence
from actqkv_cpp.evaluation.generator.lexicon import (
    ADJECTIVES,
    ATTRIBUTE_NAMES,
    ATTRIBUTES,
    KINSHIPS,
    ROLES,
    WORDS,
    plural,
)
from actqkv_cpp.evaluation.generator.source import Source, capitalised
from actqkv_cpp.evaluation.generator.templates import (
    ATTRIBUTE_QUESTIONS,
    ATTRIBUTE_STATEMENTS,
    EMPLOYER,
    EMPLOYERS,
    HOME,
    HOME_QUESTION,
    HOMES,
    JSON_LINES,
    JSON_QUESTIONS,
    KEYED_KEYS,
    KIN,
    KIN_ATTRIBUTE_QUESTIONS,
    KIN_HOME_QUESTIONS,
    KIN_QUESTIONS,
    LIST_KEY_QUESTIONS,
    LIST_KEYS,
    LIST_QUESTIONS,
    LONG_NUMBERS,
    NOT_STATED,
    PLAIN_ATTRIBUTE_QUESTION,
    PLAIN_KEYS,
    QUOTABLE,
    QUOTE_QUESTIONS,
    RELATIONS,
    SENTENCE_REQUESTS,
    VARIABLE_QUESTIONS,
    Relation,
)

TASKS = ("passkey", "number", "fact", "multi", "json", "twohop", "var", "list", "quote", "absent")


@dataclass(frozen=True)
class Fact:
    """One statement of the document; `own_line` keeps it on a line by itself (table rows, code)."""

    text: str
    own_line: bool = False


@dataclass(frozen=True)
class Mention:
    """Characters [start, end) of the text of one of `FactSheet.facts`."""

    fact: int
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """A part of an answer, from its character `start` on, that says what `mention` says."""

    start: int
    mention: Mention


@dataclass(frozen=True)
class Asked:
    """A question before its facts have a place.

    Attributes:
        question, answer: as `documents.Question` has them.
        task: one of `TASKS`, or "var3".
        readings: what the answer is read from; none for "not stated".
        bridges: what must be read before, to know where the answer stands, in that order.
        in_text_order: the answer lists what is read in the order of the document, not in this one.
    """

    question: str
    answer: str
    task: str
    readings: tuple[Reading, ...] = ()
    bridges: tuple[Mention, ...] = ()
    in_text_order: bool = False

    @property
    def facts(self) -> tuple[int, ...]:
        """The facts needed, as indices into `FactSheet.facts`."""
        mentions = (*self.bridges, *(reading.mention for reading in self.readings))
        return tuple(dict.fromkeys(mention.fact for mention in mentions))


@dataclass(frozen=True)
class Statement:
    """A sentence, and the value in it that a question may ask for."""

    text: str
    value: str
    start: int  # of the value, in characters


def stated(template: str, value: str, *, slot: str = "value", **slots: str) -> Statement:
    """`template` with its slots filled; `slot` takes `value`, and where that first stands is kept."""
    mark = "\0"
    text = template.format(**slots, **{slot: mark})
    return Statement(capitalised(text.replace(mark, value)), value, text.index(mark))


@dataclass(frozen=True)
class SecondHop:
    """What is stated of a relative; `question` asks through the relative (slots person, kinship)."""

    statement: Statement
    question: str
    direct_question: str


class FactSheet:
    """Collects facts and questions, none of which says or asks the same of the same subject twice.

    `plant(task)` draws one more subject for a task. What is said about a subject is claimed first, and so is what a
    "not stated" question asks; a draw that repeats a claim plants nothing.

    Args:
        source: drawn from.
        sentence_share: share of the questions about attributes that ask for a whole sentence.
        repeat_chance: by which a digit of a long number repeats the one before.
    """

    def __init__(self, source: Source, *, sentence_share: float = 0.0, repeat_chance: float = 0.5) -> None:
        self.source = source
        self.sentence_share = sentence_share
        self.repeat_chance = repeat_chance
        self.facts: list[Fact] = []
        self.n_chars = 0  # of the facts, each with a separator
        self.asked: list[Asked] = []
        self._claims: set[object] = set()
        self._described: list[str] = []  # subjects of `_several_attributes`, of which "not stated" asks more
        self._plain_keys = list(PLAIN_KEYS)
        source.rng.shuffle(self._plain_keys)
        self._planters: dict[str, Callable[[], None]] = {
            "passkey": self._pass_key,
            "number": self._long_number,
            "fact": self._single_fact,
            "multi": self._several_attributes,
            "json": self._table,
            "twohop": self._two_hops,
            "var": self._variables,
            "list": self._several_values,
            "quote": self._quotation,
            "absent": self._not_stated,
        }

    def plant(self, task: str) -> None:
        """Add facts and questions for one of `TASKS`; now and then nothing, or a side question of another task."""
        self._planters[task]()

    def _claim(self, *key: object) -> bool:
        """Whether `key` was free; it is taken from now on."""
        if key in self._claims:
            return False
        self._claims.add(key)
        return True

    def _state(self, statement: Statement, *, own_line: bool = False) -> Mention:
        """Add a fact; returns where its value stands."""
        self.facts.append(Fact(statement.text, own_line))
        self.n_chars += len(statement.text) + 1
        return Mention(len(self.facts) - 1, statement.start, statement.start + len(statement.value))

    def _ask(self, question: str, answer: str, task: str, mention: Mention, *bridges: Mention) -> None:
        self.asked.append(Asked(question, answer, task, (Reading(0, mention),), bridges))

    # passkey, number

    def _pass_key(self) -> None:
        source = self.source
        number = source.digits((4, 5, 5, 5, 6, 7))
        if self._plain_keys and source.chance(0.4):
            phrase = self._plain_keys.pop()
            if self._claim("key phrase", phrase.question):
                self._ask(phrase.question, number, "passkey", self._state(stated(phrase.statement, number)))
                return
        phrase = source.pick(KEYED_KEYS)
        key = source.key_name()
        if not self._claim("key", key):
            return
        slot = "word" if "{word}" in phrase.statement else "value"
        answer = source.pick(WORDS) if slot == "word" else number
        mention = self._state(stated(phrase.statement, answer, slot=slot, key=key))
        self._ask(phrase.question.format(key=key), answer, "passkey", mention)

    def _long_number(self) -> None:
        """A number of ten digits, made by repeating some: hard to copy, since what follows a digit differs."""
        source = self.source
        phrase = source.pick(LONG_NUMBERS)
        key = source.key_name()
        if not self._claim("long number", key):
            return
        number = source.repetitive_digits(10, chance=self.repeat_chance)
        mention = self._state(stated(phrase.statement, number, key=key))
        self._ask(phrase.question.format(key=key), number, "number", mention)

    # fact

    def _single_fact(self) -> None:
        source = self.source
        if source.chance(0.5):
            self._attribute(source.subject(), source.pick(ATTRIBUTE_NAMES), "fact")
            return
        self._relation(source.pick(RELATIONS), self._relation_slots(), "fact")

    def _relation(self, relation: Relation, slots: dict[str, str], task: str) -> None:
        if not self._claim_relation(relation, slots):
            return
        source = self.source
        value = source.value(relation.value)
        question = source.pick(relation.questions).format(**slots)
        statement = stated(source.pick(relation.statements), value, **slots)
        self._ask_plainly_or_not(question, statement, task, stated(relation.statements[0], value, **slots))

    def _relation_slots(self) -> dict[str, str]:
        source = self.source
        return {
            "person": source.person(),
            "object": source.claimed_object(),
            "place": source.place(),
            "role": source.pick(ROLES),
        }

    def _claim_relation(self, relation: Relation, slots: dict[str, str]) -> bool:
        subject = slots["role"] + slots["place"] if relation.about == "role" else slots[relation.about]
        return self._claim(subject, relation.statements)

    def _attribute(self, subject: str, attribute: str, task: str) -> Mention | None:
        """State an attribute and ask for it; where the value stands, or None if the subject has it already."""
        if not self._claim(subject, attribute):
            return None
        source = self.source
        slots = {"subject": subject, "Subject": capitalised(subject), "attribute": attribute}
        value = source.value(ATTRIBUTES[attribute])
        statement = stated(source.pick(ATTRIBUTE_STATEMENTS), value, **slots)
        question = source.pick(ATTRIBUTE_QUESTIONS).format(**slots)
        return self._ask_plainly_or_not(question, statement, task, stated(ATTRIBUTE_STATEMENTS[0], value, **slots))

    def _ask_plainly_or_not(self, question: str, statement: Statement, task: str, sentence: Statement) -> Mention:
        """State a fact; ask for its value, or, `sentence_share` of the time, for `sentence`."""
        source = self.source
        mention = self._state(statement)
        if source.chance(self.sentence_share):
            question = source.pick(SENTENCE_REQUESTS).format(q=question)
            self.asked.append(Asked(question, sentence.text, task, (Reading(sentence.start, mention),)))
        else:
            self._ask(question, statement.value, task, mention)
        return mention

    # multi

    def _several_attributes(self) -> None:
        """Several attributes of one subject; often the first two again of a subject with nearly the same name."""
        source = self.source
        subject = source.subject()
        if not self._claim("subject", subject):
            return
        self._described.append(subject)
        attributes = source.rng.sample(ATTRIBUTE_NAMES, source.pick((2, 3, 3, 4)))
        for attribute in attributes:
            self._attribute(subject, attribute, "multi")
        if not source.chance(0.6):
            return
        twin = self._near_twin(subject)
        if twin is not None and twin != subject and self._claim("subject", twin):
            for attribute in attributes[:2]:
                self._attribute(twin, attribute, "multi")

    def _near_twin(self, subject: str) -> str | None:
        source = self.source
        words = subject.split(" ")
        if any(preposition in subject for preposition in (" from ", " in ", " of ")):
            return " ".join([*words[:-1], source.place()])
        if subject.startswith("the "):
            return f"the {source.pick(ADJECTIVES)} {words[-1]}"
        if len(words) > 1 and subject[0].isupper() and not subject.startswith("Project"):
            return f"{words[0]} {source.surname()}" if source.chance(0.5) else f"{source.first_name()} {words[1]}"
        return None

    # json

    def _table(self) -> None:
        """A few rows of keys and values in one notation, each row asked for."""
        source = self.source
        n_rows = source.pick((3, 4, 5, 6))
        kind = source.pick(TABLES)
        rows = [(kind.key(source), kind.value(source)) for _ in range(n_rows)]
        rows = [(key, value) for key, value in rows if self._claim("row", key)]
        line = source.pick(JSON_LINES)
        for key, value in rows:
            question = source.pick(JSON_QUESTIONS).format(key=key)
            self._ask(question, value, "json", self._state(stated(line, value, key=key), own_line=True))

    # twohop

    def _two_hops(self) -> None:
        """A relative or employer, and a fact about that person, asked for through the first person."""
        source = self.source
        person, other, kinship = source.person(), source.person(), source.pick(KINSHIPS)
        if person == other or not self._claim("subject", person) or not self._claim("subject", other):
            return
        if kinship == "employer" and not self._claim(person, EMPLOYER.statements):
            return
        template = source.pick(EMPLOYERS if kinship == "employer" else KIN)
        hop = self._home(other) if source.chance(0.5) else self._kin_attribute(other)
        if hop is None:
            return
        slots = {"person": person, "kinship": kinship}
        first = self._state(stated(template, other, slot="other", **slots))
        second = self._state(hop.statement)
        self._ask(hop.question.format(**slots), hop.statement.value, "twohop", second, first)
        if source.chance(0.35):
            self._ask(source.pick(KIN_QUESTIONS).format(**slots), other, "fact", first)
        if source.chance(0.25):
            self._ask(hop.direct_question, hop.statement.value, "fact", second)

    def _home(self, person: str) -> SecondHop | None:
        source = self.source
        if not self._claim(person, HOME.statements):
            return None
        statement = stated(source.pick(HOMES), source.place(), person=person)
        return SecondHop(statement, source.pick(KIN_HOME_QUESTIONS), HOME_QUESTION.format(person=person))

    def _kin_attribute(self, person: str) -> SecondHop | None:
        source = self.source
        attribute = source.pick(ATTRIBUTE_NAMES)
        if not self._claim(person, attribute):
            return None
        slots = {"subject": person, "Subject": person, "attribute": attribute}
        statement = stated(source.pick(ATTRIBUTE_STATEMENTS), source.value(ATTRIBUTES[attribute]), **slots)
        question = source.pick(KIN_ATTRIBUTE_QUESTIONS).replace("{attribute}", attribute)
        return SecondHop(statement, question, PLAIN_ATTRIBUTE_QUESTION.format(**slots))

    # var

    def _variables(self) -> None:
        """An assignment and one or two aliases of it: task "var" follows one alias, "var3" two, "fact" none."""
        source = self.source
        first, alias, alias_of_alias = self._variable_names(3)
        value = source.digits((3, 4, 5))
        prefix = source.pick(("VAR ", "VAR ", "", "let "))
        end = ";" if prefix == "let " else ""
        reference = "VAR " if prefix == "VAR " and source.chance(0.5) else ""
        own_line = source.chance(0.8)

        def assign(name: str, value: str, sign: str = "") -> Mention:
            return self._state(stated(f"{prefix}{name} = {sign}{{value}}{end}", value), own_line=own_line)

        def ask(name: str, task: str, *bridges: Mention) -> None:
            self._ask(source.pick(VARIABLE_QUESTIONS).format(name=name), value, task, number, *bridges)

        number = assign(first, value)
        to_first = assign(alias, first, reference)
        ask(alias, "var", to_first)
        if source.chance(0.35):
            ask(first, "fact")
        if source.chance(0.3):
            ask(alias_of_alias, "var3", assign(alias_of_alias, alias, reference), to_first)

    def _variable_names(self, n_names: int) -> list[str]:
        source = self.source
        upper = source.chance(0.5)
        names: list[str] = []
        while len(names) < n_names:
            name = source.letters("abcdefghijklmnopqrstuvwxyz", source.pick((2, 3, 3, 4, 5)))
            name += source.pick("0123456789") if source.chance(0.3) else ""
            name = name.upper() if upper else name
            if self._claim("variable", name):
                names.append(name)
        return names

    # list

    def _several_values(self) -> None:
        """Two to four values in one answer: one attribute of several subjects, or all numbers of one key."""
        source = self.source
        n_values = source.pick((2, 2, 3, 4))
        if source.chance(0.5):
            self._attributes_of_several(n_values)
        else:
            self._values_of_one_key(n_values)

    def _attributes_of_several(self, n_values: int) -> None:
        source = self.source
        attribute = source.pick(ATTRIBUTE_NAMES)
        subjects = list(dict.fromkeys(source.person() for _ in range(n_values)))
        mentions, values = [], []
        for subject in subjects:
            mention = self._attribute(subject, attribute, "fact")
            if mention is None:
                return
            mentions.append(mention)
            values.append(self.facts[mention.fact].text[mention.start : mention.end])
        if len(subjects) < 2:
            return
        question = source.pick(LIST_QUESTIONS).format(attribute=plural(attribute), subjects=listing(subjects))
        self._ask_list(question, values, mentions)

    def _values_of_one_key(self, n_values: int) -> None:
        source = self.source
        key = source.key_name()
        if not self._claim("key", key):
            return
        values = list(dict.fromkeys(source.digits(7) for _ in range(n_values)))
        mentions = [self._state(stated(LIST_KEYS, value, key=key)) for value in values]
        question = source.pick(LIST_KEY_QUESTIONS).format(key=key)
        self._ask_list(question, values, mentions, in_text_order=True)

    def _ask_list(
        self, question: str, values: Sequence[str], mentions: Sequence[Mention], *, in_text_order: bool = False
    ) -> None:
        answer = listing(values)
        starts = listing_starts(values)
        readings = tuple(Reading(start, mention) for start, mention in zip(starts, mentions, strict=True))
        self.asked.append(Asked(question, answer, "list", readings, in_text_order=in_text_order))

    # quote

    def _quotation(self) -> None:
        """A sentence that begins with its subject, to be repeated word for word."""
        source = self.source
        if source.chance(0.5):
            phrase = source.claimed_object()
            if not self._claim("object", phrase):
                return
            sentence, subject = object_sentence(source, phrase, QUOTABLE), f"the {phrase}"
        else:
            subject, attribute = source.subject(), source.pick(ATTRIBUTE_NAMES)
            if not self._claim("subject", subject) or not self._claim(subject, attribute):
                return
            statement = source.pick([s for s in ATTRIBUTE_STATEMENTS if s.startswith("{Subject}")])
            value = source.value(ATTRIBUTES[attribute])
            sentence = statement.format(Subject=capitalised(subject), attribute=attribute, value=value)
        question = source.pick(QUOTE_QUESTIONS).format(subject=subject)
        self._ask(question, sentence, "quote", self._state(Statement(sentence, sentence, 0)))

    # absent

    def _not_stated(self) -> None:
        """A question of the same form as the others, about something that no fact states."""
        question = self._unanswerable()
        if question is not None:
            self.asked.append(Asked(question, NOT_STATED, "absent"))

    def _unanswerable(self) -> str | None:
        source = self.source
        described = self._described and source.chance(0.5)
        subject = source.pick(self._described) if described else source.subject()
        kind = source.rng.random()
        if kind < 0.5:
            attribute = source.pick(ATTRIBUTE_NAMES)
            if not self._claim(subject, attribute):
                return None
            slots = {"subject": subject, "Subject": capitalised(subject), "attribute": attribute}
            return source.pick(ATTRIBUTE_QUESTIONS).format(**slots)
        if kind < 0.75:
            relation = source.pick(RELATIONS)
            question = source.pick(relation.questions)
            slots = self._relation_slots()
            return question.format(**slots) if self._claim_relation(relation, slots) else None
        if kind < 0.87:
            key = source.hex_digits((6, 8, 8))
            return source.pick(JSON_QUESTIONS).format(key=key) if self._claim("row", key) else None
        if kind < 0.9:
            return source.pick(VARIABLE_QUESTIONS).format(name=self._variable_names(1)[0])
        if self._plain_keys and source.chance(0.5):
            question = self._plain_keys.pop().question
            return question if self._claim("key phrase", question) else None
        key = source.key_name()
        return source.pick(KEYED_KEYS).question.format(key=key) if self._claim("key", key) else None


def listing(values: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))


def listing_starts(values: Sequence[str]) -> list[int]:
    """Where each of `values` begins in their `listing`."""
    starts, start = [], 0
    for index, value in enumerate(values):
        starts.append(start)
        start += len(value) + (len(" and ") if index == len(values) - 2 else len(", "))
    return starts


@dataclass(frozen=True)
class TableKind:
    """How the keys and the values of one table are drawn."""

    key: Callable[[Source], str]
    value: Callable[[Source], str]


def _hex8(source: Source) -> str:
    return source.hex_digits(8)


def _hex(source: Source) -> str:
    return source.hex_digits((4, 6, 8))


def _two_words(source: Source) -> str:
    return f"{source.pick(WORDS)}_{source.pick(WORDS)}"


def _uuid(source: Source) -> str:
    return "-".join(source.hex_digits(n) for n in (8, 4, 4, 4, 12))


def _number(source: Source) -> str:
    return source.digits((4, 5, 6))


TABLES = (
    TableKind(_hex8, _hex8),
    TableKind(_hex8, _hex8),
    TableKind(_hex8, _hex8),
    TableKind(_hex, _number),
    TableKind(_two_words, _number),
    TableKind(_two_words, _hex),
    TableKind(Source.first_name, Source.place),
    TableKind(_uuid, _uuid),
)
