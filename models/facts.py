"""Facts and the questions about them: one method of `FactSheet` per task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.filler import object_sentence
from models.lexicon import ADJECTIVES, ATTRIBUTE_NAMES, ATTRIBUTES, KINSHIPS, ROLES, WORDS
from models.source import Source, capitalised
from models.templates import (
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
    NOT_STATED,
    PLAIN_ATTRIBUTE_QUESTION,
    PLAIN_KEYS,
    QUOTABLE,
    QUOTE_QUESTIONS,
    RELATIONS,
    VARIABLE_QUESTIONS,
    Relation,
)

TASKS = ("passkey", "fact", "multi", "json", "twohop", "var", "quote", "absent")


@dataclass(frozen=True)
class Fact:
    """One statement of the document; `own_line` keeps it on a line by itself (table rows, code)."""

    text: str
    own_line: bool = False


@dataclass(frozen=True)
class Asked:
    """A question before its facts have a place; `facts` are indices into `FactSheet.facts`, empty for "not stated"."""

    question: str
    answer: str
    facts: tuple[int, ...]
    task: str


@dataclass(frozen=True)
class SecondHop:
    """What is stated of a relative; `question` asks through the relative (slots person, kinship)."""

    statement: str
    value: str
    question: str
    direct_question: str


class FactSheet:
    """Collects facts and questions, none of which says or asks the same of the same subject twice.

    `plant(task)` draws one more subject for a task. What is said about a subject is claimed first, and so is what a
    "not stated" question asks; a draw that repeats a claim plants nothing.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.facts: list[Fact] = []
        self.n_chars = 0  # of the facts, each with a separator
        self.asked: list[Asked] = []
        self._claims: set[object] = set()
        self._described: list[str] = []  # subjects of `_several_attributes`, of which "not stated" asks more
        self._plain_keys = list(PLAIN_KEYS)
        source.rng.shuffle(self._plain_keys)
        self._planters: dict[str, Callable[[], None]] = {
            "passkey": self._pass_key,
            "fact": self._single_fact,
            "multi": self._several_attributes,
            "json": self._table,
            "twohop": self._two_hops,
            "var": self._variables,
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

    def _state(self, text: str, *, own_line: bool = False) -> int:
        self.facts.append(Fact(text, own_line))
        self.n_chars += len(text) + 1
        return len(self.facts) - 1

    def _ask(self, question: str, answer: str, task: str, *facts: int) -> None:
        self.asked.append(Asked(question, answer, facts, task))

    # passkey

    def _pass_key(self) -> None:
        source = self.source
        number = source.digits((4, 5, 5, 5, 6, 7))
        if self._plain_keys and source.chance(0.4):
            phrase = self._plain_keys.pop()
            if self._claim("key phrase", phrase.question):
                self._ask(phrase.question, number, "passkey", self._state(phrase.statement.format(value=number)))
                return
        phrase = source.pick(KEYED_KEYS)
        key = self._key_name()
        if not self._claim("key", key):
            return
        word = source.pick(WORDS)
        answer = word if "{word}" in phrase.statement else number
        fact = self._state(phrase.statement.format(key=key, value=number, word=word))
        self._ask(phrase.question.format(key=key), answer, "passkey", fact)

    def _key_name(self) -> str:
        source = self.source
        if source.chance(0.4):
            return source.pick(WORDS)
        if source.chance(0.6):
            return source.place()
        return f"{source.pick(ADJECTIVES)}-{source.pick(WORDS)}"

    # fact

    def _single_fact(self) -> None:
        source = self.source
        if source.chance(0.5):
            self._attribute(source.subject(), source.pick(ATTRIBUTE_NAMES), "fact")
            return
        relation = source.pick(RELATIONS)
        slots = self._relation_slots()
        if not self._claim_relation(relation, slots):
            return
        slots["value"] = source.value(relation.value)
        question = source.pick(relation.questions).format(**slots)
        fact = self._state(capitalised(source.pick(relation.statements).format(**slots)))
        self._ask(question, slots["value"], "fact", fact)

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

    def _attribute(self, subject: str, attribute: str, task: str) -> None:
        if not self._claim(subject, attribute):
            return
        source = self.source
        slots = {"subject": subject, "Subject": capitalised(subject), "attribute": attribute}
        value = source.value(ATTRIBUTES[attribute])
        fact = self._state(capitalised(source.pick(ATTRIBUTE_STATEMENTS).format(**slots, value=value)))
        self._ask(source.pick(ATTRIBUTE_QUESTIONS).format(**slots), value, task, fact)

    # multi

    def _several_attributes(self) -> None:
        """Several attributes of one subject; sometimes the first two again of a subject with nearly the same name."""
        source = self.source
        subject = source.subject()
        if not self._claim("subject", subject):
            return
        self._described.append(subject)
        attributes = source.rng.sample(ATTRIBUTE_NAMES, source.pick((2, 3, 3, 4)))
        for attribute in attributes:
            self._attribute(subject, attribute, "multi")
        if not source.chance(0.4):
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
            return f"{words[0]} {source.surname()}"
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
            self._ask(question, value, "json", self._state(line.format(key=key, value=value), own_line=True))

    # twohop

    def _two_hops(self) -> None:
        """A relative or employer, and a fact about that person, asked for through the first person."""
        source = self.source
        person, other, kinship = source.person(), source.person(), source.pick(KINSHIPS)
        if person == other or not self._claim("subject", person) or not self._claim("subject", other):
            return
        if kinship == "employer" and not self._claim(person, EMPLOYER.statements):
            return
        kin = source.pick(EMPLOYERS if kinship == "employer" else KIN).format(
            person=person, other=other, kinship=kinship
        )
        hop = self._home(other) if source.chance(0.5) else self._kin_attribute(other)
        if hop is None:
            return
        first, second = self._state(kin), self._state(hop.statement)
        slots = {"person": person, "kinship": kinship}
        self._ask(hop.question.format(**slots), hop.value, "twohop", first, second)
        if source.chance(0.35):
            self._ask(KIN_QUESTIONS[0 if source.chance(0.5) else 1].format(**slots), other, "fact", first)
        if source.chance(0.25):
            self._ask(hop.direct_question, hop.value, "fact", second)

    def _home(self, person: str) -> SecondHop | None:
        source = self.source
        if not self._claim(person, HOME.statements):
            return None
        value = source.place()
        statement = source.pick(HOMES).format(person=person, value=value)
        return SecondHop(statement, value, source.pick(KIN_HOME_QUESTIONS), HOME_QUESTION.format(person=person))

    def _kin_attribute(self, person: str) -> SecondHop | None:
        source = self.source
        attribute = source.pick(ATTRIBUTE_NAMES)
        if not self._claim(person, attribute):
            return None
        value = source.value(ATTRIBUTES[attribute])
        slots = {"subject": person, "Subject": person, "attribute": attribute}
        statement = capitalised(source.pick(ATTRIBUTE_STATEMENTS).format(**slots, value=value))
        question = source.pick(KIN_ATTRIBUTE_QUESTIONS).replace("{attribute}", attribute)
        return SecondHop(statement, value, question, PLAIN_ATTRIBUTE_QUESTION.format(**slots))

    # var

    def _variables(self) -> None:
        """An assignment and one or two aliases of it: task "var" follows one alias, "var3" two, "fact" none."""
        source = self.source
        first, alias, alias_of_alias, _unused = self._variable_names()
        value = source.digits((3, 4, 5))
        prefix = source.pick(("VAR ", "VAR ", "", "let "))
        end = ";" if prefix == "let " else ""
        own_line = source.chance(0.8)
        facts = [self._state(f"{prefix}{first} = {value}{end}", own_line=own_line)]
        reference = "VAR " if prefix == "VAR " and source.chance(0.5) else ""
        facts.append(self._state(f"{prefix}{alias} = {reference}{first}{end}", own_line=own_line))
        self._ask(source.pick(VARIABLE_QUESTIONS).format(name=alias), value, "var", *facts)
        if source.chance(0.35):
            self._ask(source.pick(VARIABLE_QUESTIONS).format(name=first), value, "fact", facts[0])
        if source.chance(0.3):
            facts.append(self._state(f"{prefix}{alias_of_alias} = {reference}{alias}{end}", own_line=own_line))
            self._ask(source.pick(VARIABLE_QUESTIONS).format(name=alias_of_alias), value, "var3", *facts)

    def _variable_names(self) -> list[str]:
        """Four new names, of which three are needed: the held-out sets were drawn so."""
        source = self.source
        upper = source.chance(0.5)
        names: list[str] = []
        while len(names) < 4:
            name = source.letters("abcdefghijklmnopqrstuvwxyz", source.pick((2, 3, 3, 4)))
            name += source.pick("0123456789") if source.chance(0.3) else ""
            name = name.upper() if upper else name
            if self._claim("variable", name):
                names.append(name)
        return names

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
        self._ask(question, sentence, "quote", self._state(sentence))

    # absent

    def _not_stated(self) -> None:
        """A question of the same form as the others, about something that no fact states."""
        question = self._unanswerable()
        if question is not None:
            self._ask(question, NOT_STATED, "absent")

    def _unanswerable(self) -> str | None:
        source = self.source
        described = self._described and source.chance(0.4)
        subject = source.pick(self._described) if described else source.subject()
        kind = source.rng.random()
        if kind < 0.55:
            attribute = source.pick(ATTRIBUTE_NAMES)
            if not self._claim(subject, attribute):
                return None
            slots = {"subject": subject, "Subject": capitalised(subject), "attribute": attribute}
            return source.pick(ATTRIBUTE_QUESTIONS).format(**slots)
        if kind < 0.8:
            relation = source.pick(RELATIONS)
            question = source.pick(relation.questions)
            slots = self._relation_slots()
            return question.format(**slots) if self._claim_relation(relation, slots) else None
        if kind < 0.9:
            key = source.hex_digits(6)
            return JSON_QUESTIONS[0].format(key=key) if self._claim("row", key) else None
        if self._plain_keys and source.chance(0.5):
            question = self._plain_keys.pop().question
            return question if self._claim("key phrase", question) else None
        key = source.place()
        return source.pick(KEYED_KEYS).question.format(key=key) if self._claim("key", key) else None


@dataclass(frozen=True)
class TableKind:
    """How the keys and the values of one table are drawn."""

    key: Callable[[Source], str]
    value: Callable[[Source], str]


def _short_hex(source: Source) -> str:
    return source.hex_digits(6)


def _two_words(source: Source) -> str:
    return f"{source.pick(WORDS)}_{source.pick(WORDS)}"


def _uuid(source: Source) -> str:
    return f"{source.hex_digits(8)}-{source.hex_digits(4)}"


def _hex(source: Source) -> str:
    return source.hex_digits((4, 6, 8))


def _number(source: Source) -> str:
    return source.digits((4, 5, 6))


TABLES = (
    TableKind(_short_hex, _hex),
    TableKind(_short_hex, _hex),
    TableKind(_short_hex, _number),
    TableKind(_two_words, _number),
    TableKind(_two_words, _hex),
    TableKind(Source.first_name, Source.place),
    TableKind(_uuid, _uuid),
)
