"""needle: one fact in neutral prose, at eleven depths; what heat maps are drawn from."""

from __future__ import annotations

from actqkv_cpp.evaluation import metrics
from actqkv_cpp.evaluation.generator import make_document
from actqkv_cpp.evaluation.generator.lexicon import ADJECTIVES, OBJECTS
from actqkv_cpp.evaluation.samples import Draft, Question, Room, Sample, Suite, spread

N_DEPTHS = 11
_ANSWER_TOKENS = 32
_PIECE_TOKENS = 32  # of prose: fitting counts in such pieces


def _needle(room: Room, index: int) -> Sample:
    rng = room.rng(index)
    n_depths = min(N_DEPTHS, room.n_samples)
    depth = spread(index % n_depths, n_depths)
    subject = f"{rng.choice(ADJECTIVES)}-{rng.choice(OBJECTS)}"
    number = str(rng.randrange(10**6, 10**7))
    fact = f"One of the special magic numbers for {subject} is: {number}."
    seed = f"needle {room.seed} {room.n_ctx} {index}"

    def make(n_pieces: int) -> Draft:
        text = prose(seed, n_pieces * _PIECE_TOKENS)
        place = text.find(". ", round(depth * len(text))) + 2 if depth > 0 else 0
        place = place if place > 1 or not depth else len(text)
        before, after = text[:place], text[place:]
        before += "" if not before or before.endswith(" ") else " "
        question = Question(
            text=f"What is the special magic number for {subject} mentioned in the provided text?",
            references=(number,),
            depth=depth,
            needles=((len(before), len(before) + len(fact)),),
        )
        return Draft(f"{before}{fact} {after}", (question,))

    return room.sample(room.fit(make, _ANSWER_TOKENS), _ANSWER_TOKENS)


def prose(seed: str, n_tokens: int) -> str:
    """About `n_tokens` tokens of neutral prose without facts; equal arguments give equal prose."""
    return make_document(n_tokens, tasks=["passkey"], seed=seed, heldout=True, styles=["prose"], count=0).text


SUITE = Suite(
    name="needle",
    about="one fact with a seven-digit number in neutral prose, at eleven depths",
    n_samples=2 * N_DEPTHS,
    make=_needle,
    score=lambda question, said: metrics.contains(said, question.references[0]),
)
