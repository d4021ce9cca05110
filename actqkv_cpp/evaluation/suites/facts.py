"""facts and read-once: documents of the bundled model's own kind, from our generator."""

from __future__ import annotations

from collections import Counter

from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.generator import Question as Generated
from actqkv_cpp.evaluation.generator import make_document
from actqkv_cpp.evaluation.generator.facts import TASKS
from actqkv_cpp.evaluation.samples import Draft, Question, Room, Sample, Suite

SINGLE_TASKS = ("passkey", "fact", "multi", "json")  # of which read-once and long-answer ask
_ANSWER_TOKENS = 64
_PIECE_TOKENS = 32  # fitting counts in such pieces
_SHORT_CTX = 2048  # below it there is no room for two questions of each task and text between them
_N_SPREAD = 10  # questions of read-once


def _question(made: Generated) -> Question:
    return Question(
        text=made.question,
        references=(made.answer,),
        depth=made.depth if made.depth >= 0 else None,
        task=made.task,
        needles=tuple(made.passages),
    )


def draft_facts(room: Room, index: int, n_tokens: int, *, tasks: tuple[str, ...], count: int) -> Draft:
    """A document of about `n_tokens` with at most `count` questions of each task."""
    seed = f"{room.suite} {room.seed} {room.n_ctx} {index}"
    made = make_document(n_tokens, tasks=tasks, seed=seed, heldout=True, count=count)
    n_taken: Counter[str] = Counter()
    questions = []
    for question in made.questions:
        n_taken[question.task] += 1
        if n_taken[question.task] <= count:
            questions.append(_question(question))
    return Draft(made.text, tuple(questions))


def _facts(room: Room, index: int) -> Sample:
    count = 1 if room.n_ctx < _SHORT_CTX else 2

    def make(n_pieces: int) -> Draft:
        return draft_facts(room, index, n_pieces * _PIECE_TOKENS, tasks=TASKS, count=count)

    return room.sample(room.fit(make, _ANSWER_TOKENS), _ANSWER_TOKENS)


def _read_once(room: Room, index: int) -> Sample:
    def make(n_pieces: int) -> Draft:
        draft = draft_facts(room, index, n_pieces * _PIECE_TOKENS, tasks=SINGLE_TASKS, count=_N_SPREAD)
        return Draft(draft.document, _at_spread_depths(draft.questions))

    return room.sample(room.fit(make, _ANSWER_TOKENS), _ANSWER_TOKENS)


def _at_spread_depths(questions: tuple[Question, ...]) -> tuple[Question, ...]:
    """Ten questions, each the one left whose depth is nearest to the middle of its tenth of the document."""
    left = [question for question in questions if question.depth is not None]
    chosen = []
    for i in range(min(_N_SPREAD, len(left))):
        nearest = min(left, key=lambda question: abs((question.depth or 0.0) - (i + 0.5) / _N_SPREAD))
        left.remove(nearest)
        chosen.append(nearest)
    return tuple(chosen)


def _exact(question: Question, said: str) -> float:
    return metrics.exact(said, question.references[0])


SUITES = (
    Suite(
        name="facts",
        about="natural sentences with distractors, two hops and what is not stated; of the bundled model's own kind",
        n_samples=5,
        make=_facts,
        score=_exact,
    ),
    Suite(
        name="read-once",
        about="one document, read without knowing the ten questions asked about it at spread depths",
        n_samples=3,
        make=_read_once,
        score=_exact,
    ),
)
