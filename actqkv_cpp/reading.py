"""A reading on its way into a session, and the places of a conversation: what `Document` and `Chat` are made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from actqkv_cpp.reader import TextFile
from actqkv_cpp.template import Cursor, Part, Span, Step, Tokens, no_tokens

if TYPE_CHECKING:
    from actqkv_cpp.figures import Phase

QUESTION = -1  # in place of a document's number: the question of question-aware prefill


@dataclass(frozen=True)
class Place:
    """Where a conversation stands: all that the next turn needs. Frozen, so that it can be returned to."""

    cursor: Cursor
    before: tuple[Part, ...]  # of the prompt, before the user's text
    after: tuple[Part, ...]  # between the user's text and the answer
    files: tuple[TextFile, ...] = ()
    spans: tuple[Span, ...] = ()
    history: Tokens = field(default_factory=no_tokens)  # of the session here, to notice when it was used otherwise


@dataclass
class Reading:
    """Documents on their way into the session: tokens [n_total] to be read after `place`, of which `n_read` are in."""

    place: Place
    closing: tuple[Part, ...]  # what follows the documents, for a reading that ends early
    step: Step
    done: Place
    n_read: int = 0
    seconds: float = 0.0
    history: Tokens = field(default_factory=no_tokens)  # of the session, after what was read

    @property
    def n_total(self) -> int:
        return len(self.step.tokens)

    def here(self) -> Place:
        """Where the next turn starts: after the reading, or after the part of it that was done."""
        if self.n_read == self.n_total:
            return replace(self.done, history=self.history)
        n_past = min(self.step.keep + self.n_read, max(span.end for span in self.done.spans))
        spans = tuple(replace(s, ends=s.ends[: n_past - s.start]) for s in self.done.spans if s.start < n_past)
        if len(spans) <= len(self.place.spans):  # not a word of the documents: as if they had not been given
            return self.place
        return replace(self.done, cursor=Cursor(n_past), before=self.closing, spans=spans, history=self.history)

    def segments(self) -> list[tuple[Tokens, Phase]]:
        """What is left to read: tokens and the phase they enter in."""
        return self._segments(self.n_read)

    def all_segments(self) -> list[tuple[Tokens, Phase]]:
        """All that is read, from the first token on."""
        return self._segments(0)

    def _segments(self, first: int) -> list[tuple[Tokens, Phase]]:
        ours = [span for span in self.step.spans if span.document == QUESTION]
        begin, end = (ours[0].start - self.step.keep, ours[0].end - self.step.keep) if ours else (0, 0)
        cuts: list[tuple[int, int, Phase]] = [
            (0, begin, "prefill"), (begin, end, "question"), (end, self.n_total, "prefill"),
        ]  # fmt: skip
        return [(self.step.tokens[max(a, first) : b], phase) for a, b, phase in cuts if b > first]
