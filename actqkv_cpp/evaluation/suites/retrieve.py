"""passkey, number and kv: the synthetic tasks of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718), their prompts
and scores.

The published prompt is split where the document ends: instruction and context are the document, the rest is the
question.
"""

from __future__ import annotations

import random
import uuid

from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.samples import Draft, Question, Room, Sample, Suite, spread

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"

_FIND = "There is an important info hidden inside a lot of irrelevant text. Find it{}. I will quiz you about the "
_FIND += "important information there.\n\n"
_KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_KV_QUESTION = 'Key: "{}"\nThe value associated with the specified key is: '
_N_KV_QUESTIONS = 10  # keys asked for in one object, so that one reading serves them all
_ANSWER_TOKENS = 16
_UUID_TOKENS = 64  # a tokenizer without merges of digits takes one token per character, and quotes


def _hidden_line(room: Room, index: int, *, instruction: str, line: str, question: str, key: str) -> Sample:
    """Noise with one line at the depth of this sample; the line says `key`."""
    depth = spread(index, room.n_samples)
    said = line.format(key=key)

    def make(n_noise: int) -> Draft:
        before = instruction + NOISE * round(depth * n_noise)
        text = before + said + NOISE * (n_noise - round(depth * n_noise))
        needle = (len(before), len(before) + len(said))
        return Draft(text, (Question(text=question, references=(key,), depth=depth, needles=(needle,)),))

    return room.sample(room.fit(make, _ANSWER_TOKENS), _ANSWER_TOKENS)


def _passkey(room: Room, index: int) -> Sample:
    key = "".join(room.rng(index).choices("0123456789", k=5))
    return _hidden_line(
        room,
        index,
        instruction=_FIND.format(" and memorize them"),
        line="The pass key is {key}. Remember it. {key} is the pass key.\n",
        question="What is the pass key?",
        key=key,
    )


def _number(room: Room, index: int) -> Sample:
    return _hidden_line(
        room,
        index,
        instruction=_FIND.format(""),
        line="The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n",
        question="What is the sequence of digits?",
        key=repeated_digits(room.rng(index)),
    )


def repeated_digits(rng: random.Random) -> str:
    """Ten digits: five at random, then five times one of them is said twice."""
    digits = rng.choices("0123456789", k=5)
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


def kv_draft(rng: random.Random, n_pairs: int, *, n_questions: int = _N_KV_QUESTIONS, shift: float = 0.0) -> Draft:
    """One JSON object of `n_pairs`; the keys asked for are spread over it, `shift`, 0 to 1, of their distance on."""
    pairs = [(_uuid(rng), _uuid(rng)) for _ in range(n_pairs)]
    parts = [f'"{key}": "{value}"' for key, value in pairs]
    text = _KV_HEAD + "{" + ", ".join(parts) + "}\n"
    starts = [len(_KV_HEAD) + 1]
    for part in parts:
        starts.append(starts[-1] + len(part) + 2)
    questions = []
    for i in range(n_questions):
        depth = (i + shift) / n_questions
        place = min(int(depth * n_pairs), n_pairs - 1)
        key, value = pairs[place]
        questions.append(
            Question(
                text=_KV_QUESTION.format(key),
                references=(value,),
                depth=depth,
                needles=((starts[place], starts[place] + len(parts[place])),),
            )
        )
    return Draft(text, tuple(questions))


def _kv(room: Room, index: int) -> Sample:
    def make(n_pairs: int) -> Draft:
        return kv_draft(room.rng(index), n_pairs, shift=spread(index, room.n_samples))

    return room.sample(room.fit(make, _UUID_TOKENS), _UUID_TOKENS)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _first_integer(question: Question, said: str) -> float:
    return metrics.first_integer(said, question.references[0])


SUITES = (
    Suite(
        name="passkey",
        about="a line of noise says five digits; InfiniteBench's Retrieve.PassKey",
        n_samples=20,
        make=_passkey,
        score=_first_integer,
    ),
    Suite(
        name="number",
        about="a line of noise says ten digits with repetitions; InfiniteBench's Retrieve.Number",
        n_samples=20,
        make=_number,
        score=_first_integer,
    ),
    Suite(
        name="kv",
        about="a JSON object of random UUIDs, ten of its keys asked for; InfiniteBench's Retrieve.KV",
        n_samples=5,
        make=_kv,
        score=lambda question, said: metrics.word_among(said, question.references[0]),
    ),
)
