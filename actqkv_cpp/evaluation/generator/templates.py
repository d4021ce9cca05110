"""The sentences that facts are stated in and the questions that ask for them.

A slot is written `{name}`; `{Subject}` is the subject with a capital first letter. Statements put the value after the
subject: values that come first were hard to learn to find, because a causal model's keys have not seen the subject yet
(README.md, weaknesses). The order within each tuple matters: the text of a seed depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOT_STATED = "Not stated in the document."


@dataclass(frozen=True)
class Relation:
    """A fact in fixed words with paraphrased questions.

    Attributes:
        about: the slot that names the subject; a role is named together with its place.
        statements: sentences that state the value.
        questions: questions about the subject, each answered by the value.
        value: the kind of value, one of `source.VALUE_KINDS`.
    """

    about: Literal["person", "object", "place", "role"]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class KeyPhrase:
    """A planted key and the one question that asks for it."""

    statement: str
    question: str


ATTRIBUTE_STATEMENTS = (
    "{Subject}'s {attribute} is {value}.",
    "The {attribute} of {subject} is {value}.",
    "The {attribute} for {subject} is {value}.",
    "{Subject} has the {attribute} {value}.",
    "The {attribute} of {subject} was recorded as {value}.",
    "Records for {subject} list the {attribute} as {value}.",
    "According to the ledger, the {attribute} of {subject} is {value}.",
    "Everyone knows that {subject}'s {attribute} is {value}.",
    "It was noted that the {attribute} of {subject} is {value}.",
    "For {subject}, the {attribute} is {value}.",
    "As for {subject}, the {attribute} was changed to {value} last year.",
    "{Subject} reported the {attribute} as {value}.",
    "{Subject}: {attribute} {value}.",
    "In the register, {subject} appears with the {attribute} {value}.",
    "{Subject}, whose {attribute} is {value}, was there as well.",
    "When asked about the {attribute} of {subject}, the clerk wrote down {value}.",
    "Nobody disputes that the {attribute} of {subject} is {value}.",
    "On the list, next to {subject}, under {attribute}, stands {value}.",
)

ATTRIBUTE_QUESTIONS = (
    "What is {subject}'s {attribute}?",
    "What is the {attribute} of {subject}?",
    "What is the {attribute} for {subject}?",
    "Tell me the {attribute} of {subject}.",
    "Which {attribute} does {subject} have?",
    "What {attribute} is listed for {subject}?",
    "{Subject}: what is the {attribute}?",
    "I need the {attribute} of {subject}.",
    "Give the {attribute} of {subject}.",
    "Find the {attribute} of {subject} in the document.",
    "According to the document, what is {subject}'s {attribute}?",
    "Can you tell me {subject}'s {attribute}?",
    "What does the text give as the {attribute} of {subject}?",
    "Please look up the {attribute} of {subject}.",
    "{Subject} - {attribute}?",
)

RELATIONS = (
    Relation(
        about="person",
        statements=(
            "{person} lives in {value}.",
            "{person} settled in {value} many years ago.",
            "The house of {person} stands in {value}.",
        ),
        questions=(
            "Where does {person} live?",
            "In which town does {person} live?",
            "What town is {person}'s home?",
        ),
        value="place",
    ),
    Relation(
        about="person",
        statements=(
            "{person} was born in {value}.",
            "{person} came into the world in {value}.",
        ),
        questions=(
            "Where was {person} born?",
            "In which place was {person} born?",
        ),
        value="place",
    ),
    Relation(
        about="person",
        statements=(
            "{person} works for {value}.",
            "{person} is employed by {value}.",
            "{person} was hired by {value}.",
        ),
        questions=(
            "Who does {person} work for?",
            "Who employs {person}?",
            "Who hired {person}?",
        ),
        value="person",
    ),
    Relation(
        about="person",
        statements=(
            "{person} married {value} in the spring.",
            "{person} is married to {value}.",
        ),
        questions=(
            "Who did {person} marry?",
            "Who is {person} married to?",
        ),
        value="person",
    ),
    Relation(
        about="person",
        statements=(
            "{person} travelled to {value} by train.",
            "{person} took the night train to {value}.",
        ),
        questions=(
            "Where did {person} travel?",
            "Where did {person} go by train?",
        ),
        value="place",
    ),
    Relation(
        about="person",
        statements=(
            "{person} plays {value}.",
            "{person} has played {value} since childhood.",
        ),
        questions=(
            "What does {person} play?",
            "Which instrument does {person} play?",
        ),
        value="instrument",
    ),
    Relation(
        about="person",
        statements=(
            "{person} bought {value} at the market.",
            "At the market {person} picked up {value}.",
        ),
        questions=(
            "What did {person} buy?",
            "What did {person} buy at the market?",
        ),
        value="object",
    ),
    Relation(
        about="person",
        statements=(
            "{person} keeps {value} in the yard.",
            "{person} owns {value}.",
        ),
        questions=(
            "What animal does {person} keep?",
            "What does {person} own?",
        ),
        value="animal",
    ),
    Relation(
        about="person",
        statements=(
            "{person} arrives at {value}.",
            "{person} will be here at {value}.",
        ),
        questions=(
            "When does {person} arrive?",
            "At what time does {person} arrive?",
        ),
        value="time",
    ),
    Relation(
        about="person",
        statements=(
            "{person} was born on {value}.",
            "The birth of {person} took place on {value}.",
        ),
        questions=(
            "When was {person} born?",
            "On which day was {person} born?",
        ),
        value="date",
    ),
    Relation(
        about="object",
        statements=(
            "The {object} is kept in {value}.",
            "They store the {object} in {value}.",
            "The {object} can be found in {value}.",
        ),
        questions=(
            "Where is the {object} kept?",
            "Where is the {object}?",
            "In which town can I find the {object}?",
        ),
        value="place",
    ),
    Relation(
        about="object",
        statements=(
            "The {object} belongs to {value}.",
            "The owner of the {object} is {value}.",
        ),
        questions=(
            "Who owns the {object}?",
            "Whose is the {object}?",
            "To whom does the {object} belong?",
        ),
        value="person",
    ),
    Relation(
        about="object",
        statements=(
            "The {object} costs {value}.",
            "You can buy the {object} for {value}.",
            "The {object} was sold for {value}.",
        ),
        questions=(
            "How much does the {object} cost?",
            "What is the price of the {object}?",
            "How much is the {object}?",
        ),
        value="coins",
    ),
    Relation(
        about="object",
        statements=(
            "The {object} weighs {value}.",
            "For the {object} the scales showed {value}.",
        ),
        questions=(
            "How heavy is the {object}?",
            "What does the {object} weigh?",
        ),
        value="weight",
    ),
    Relation(
        about="object",
        statements=(
            "The {object} is the work of {value}.",
            "The {object} was made by {value}.",
        ),
        questions=("Who made the {object}?",),
        value="person",
    ),
    Relation(
        about="place",
        statements=(
            "The mayor of {place} is {value}.",
            "{place} elected a new mayor, {value}.",
        ),
        questions=(
            "Who is the mayor of {place}?",
            "Who was elected in {place}?",
        ),
        value="person",
    ),
    Relation(
        about="place",
        statements=(
            "The bridge in {place} was built in {value}.",
            "{place} got its bridge in {value}.",
        ),
        questions=(
            "When was the bridge in {place} built?",
            "In which year did {place} get its bridge?",
        ),
        value="year",
    ),
    Relation(
        about="place",
        statements=(
            "{place} has {value} inhabitants.",
            "The population of {place} is {value}.",
        ),
        questions=(
            "How many people live in {place}?",
            "What is the population of {place}?",
            "How many inhabitants does {place} have?",
        ),
        value="number",
    ),
    Relation(
        about="role",
        statements=(
            "The {role} in {place} uses locker {value}.",
            "The {role}'s locker number in {place} is {value}.",
        ),
        questions=(
            "Which locker does the {role} in {place} use?",
            "What is the locker number of the {role} in {place}?",
        ),
        value="number",
    ),
    Relation(
        about="role",
        statements=(
            "The {role} in {place} is {value}.",
            "The {role} of {place} is called {value}.",
        ),
        questions=(
            "Who is the {role} in {place}?",
            "What is the name of the {role} of {place}?",
        ),
        value="person",
    ),
    Relation(
        about="role",
        statements=(
            "The {role} of {place} opens at {value}.",
            "In {place}, the {role} starts work at {value}.",
        ),
        questions=(
            "When does the {role} of {place} open?",
            "When does the {role} in {place} start work?",
        ),
        value="time",
    ),
)

PLAIN_KEYS = (
    KeyPhrase("The pass key is {value}. Remember it. {value} is the pass key.", "What is the pass key?"),
    KeyPhrase("The pass key is {value}. Remember it.", "What is the pass key?"),
    KeyPhrase("The passkey is {value}. Remember it. {value} is the passkey.", "What is the passkey?"),
    KeyPhrase("Remember this: the secret pass key is {value}.", "What is the secret pass key?"),
    KeyPhrase("The secret code is {value}.", "What is the secret code?"),
    KeyPhrase("The magic number is {value}.", "What is the magic number?"),
    KeyPhrase("The vault combination is {value}. Do not forget it.", "What is the vault combination?"),
)

KEYED_KEYS = (
    KeyPhrase(
        "One of the special magic numbers for {key} is: {value}.",
        "What is the special magic number for {key} mentioned in the provided text?",
    ),
    KeyPhrase("The special magic number for {key} is {value}.", "What is the special magic number for {key}?"),
    KeyPhrase("The pass key for {key} is {value}.", "What is the pass key for {key}?"),
    KeyPhrase("The access code for {key} is {value}.", "What is the access code for {key}?"),
    KeyPhrase("The secret word for {key} is {word}.", "What is the secret word for {key}?"),
)

LONG_NUMBERS = (
    KeyPhrase("The sequence of digits for {key} is {value}. Remember it.", "What is the sequence of digits for {key}?"),
    KeyPhrase("The long number of {key} is {value}.", "What is the long number of {key}?"),
    KeyPhrase("Remember the sequence of digits of {key}: {value}.", "What is the sequence of digits of {key}?"),
)

LIST_KEYS = "One of the magic numbers for {key} is: {value}."
LIST_KEY_QUESTIONS = (
    "What are all the magic numbers for {key} mentioned in the provided text?",
    "What are the magic numbers for {key}?",
    "List every magic number for {key}.",
)
LIST_QUESTIONS = (
    "What are the {attribute} of {subjects}?",
    "List the {attribute} of {subjects}.",
    "Give me the {attribute} of {subjects}.",
)

SENTENCE_REQUESTS = (
    "{q} Answer in a full sentence.",
    "{q} Answer with a sentence.",
    "{q} Use a whole sentence.",
    "In a full sentence: {q}",
)

PROSE = (
    "The {adjective} {role} {verb} the {adjective2} {object} near the {spot}.",
    "Nobody {verb} the {object} behind the {spot}.",
    "In the {spot}, a {adjective} {object} lay beside the {object2}.",
    "It was a {adjective} {time}, and the {role} walked {adverb} along the {spot}.",
    "There was a {adjective} {spot} with a {object} and a {adjective2} {object2}.",
    "After the rain the {spot} looked {adjective}.",
    "The {role} {adverb} {verb} the {object}, but the {role2} only smiled.",
    "She said that the {object} was {adjective} and {adjective2}.",
    "He {verb} the {object} {adverb} and went back to the {spot}.",
    "When the {role} came, the {spot} was already {adjective}.",
    "A {role} and a {role2} talked about the {adjective} {object}.",
    "Some say the {spot} is {adjective} in {time}.",
    "They {verb} every {object} in the {spot}.",
    "If the {object} is {adjective}, the {role} will not need the {object2}.",
    "The {spot} beyond the {spot2} is {adjective} and {adjective2}.",
    "By {time} the {role} had {verb} the {object2}.",
    "For years the {role} had kept a {adjective} {object} in the {spot}, and nobody asked why.",
    "Whoever walks past the {spot} in {time} can hear the {object} and, now and then, the {role}.",
    "It is not known who first {verb} the {object}; the {role} thinks it was the {role2}.",
    "The {spot} has changed little: a {adjective} {object}, two chairs, and the smell of {time}.",
    "Every {time} the same {role} came to the {spot}, looked at the {object}, and left {adverb}.",
    "Of all that was {verb} that {time}, only the {adjective} {object} is still here.",
    '"Have you seen the {object}?" asked the {role}. "It was in the {spot}," said the {role2}.',
    "Because the {spot} was {adjective}, they {verb} the {object} {adverb} and waited for the {role}.",
    "Between the {spot} and the {spot2} there is a path that only the {role} uses in {time}.",
    "As soon as the {object} had been {verb}, the {role2} wrote a {adjective} letter about it.",
    "This part of the report describes the {spot}, its {adjective} {object}, and the work of the {role}.",
    "There is little to add: the {role} {verb} the {object}, and the {spot} stayed {adjective}.",
)

COUNTS = (
    "In {year} the {role} sold {n} of them for {n2} coins.",
    "About {n} people came to the {spot} that {time}.",
    "The {role} counted {n} {object} parts and {n2} of the {adjective} kind.",
    "Between {year} and {year2} the {spot} was closed {small} times.",
    "At {hour}:{minute} the {role} {verb} the {object} by the {spot}.",
    "Page {n} of the report mentions the {spot} and {small} visitors.",
    "The {spot} is {n} steps from the {spot2}.",
    "Some {n2} years ago, in {year}, the {role} left the {spot}.",
)

QUOTABLE = (
    "The {object} stood in the {spot} all {time}.",
    "The {object} was {adjective} and smelled of {word}.",
    "The {object} was {verb} {adverb} by a {role}.",
    "The {object} came from {place} and looked {adjective}.",
    "The {object} in the {spot} was worth more than a {object2}.",
    "The {object} fell off the {object2} near the {spot}.",
    "The {object} reminded {person} of the {spot} in {place}.",
)

ABOUT_OBJECT = (
    "The {object} stood in the {spot} all {time}.",
    "A {role} {verb} the {object} near the {spot}.",
    "Nobody in {place} had seen the {object} before.",
    "The {object} was {adjective} and smelled of {word}.",
    "{person} {verb} the {object} {adverb}.",
    "In {place} the {object} was worth more than a {object2}.",
    "They {adverb} {verb} the {object} by the {spot}.",
)

JSON_LINES = ('"{key}": "{value}",', '"{key}": "{value}",', "{key}: {value}", "{key} = {value}", "| {key} | {value} |")
JSON_QUESTIONS = (
    'What is the value for key "{key}"?',
    "What is the value of {key}?",
    'Look up "{key}".',
    "Extract the value of the key {key}.",
    "Which value belongs to {key}?",
)

HOME, EMPLOYER = RELATIONS[0], RELATIONS[2]  # the two relations that two-hop questions share
EMPLOYERS = (
    "{person} works for {other}.",
    "{person} is employed by {other}.",
    "The employer of {person} is {other}.",
)
KIN = (
    "{person}'s {kinship} is {other}.",
    "The {kinship} of {person} is {other}.",
    "The {kinship} of {person} is called {other}.",
)
KIN_QUESTIONS = ("Who is {person}'s {kinship}?", "Who is the {kinship} of {person}?")
KIN_HOME_QUESTIONS = (
    "Where does {person}'s {kinship} live?",
    "Where does the {kinship} of {person} live?",
    "In which town does the {kinship} of {person} live?",
)
KIN_ATTRIBUTE_QUESTIONS = (
    "What is the {attribute} of {person}'s {kinship}?",
    "What is the {attribute} of the {kinship} of {person}?",
    "{person}'s {kinship}: what is the {attribute}?",
)
HOMES = ("{person} lives in {value}.", "{person} settled in {value} many years ago.")
HOME_QUESTION = "Where does {person} live?"
PLAIN_ATTRIBUTE_QUESTION = "What is the {attribute} of {subject}?"

VARIABLE_QUESTIONS = (
    "What is the value of {name}?",
    "What is {name}?",
    "Which number is stored in {name}?",
    "Find the value of the variable {name}.",
)

QUOTE_QUESTIONS = (
    "Quote the sentence about {subject}.",
    "Quote the sentence that mentions {subject}.",
    "Repeat the sentence about {subject}.",
    "What exactly does the document say about {subject}?",
    "Copy the sentence with {subject}.",
)

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
