"""Conversations over documents or none: `Chat`, made by `Llama.chat`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actqkv_cpp import saved
from actqkv_cpp.answering import Generated, Sampling, SamplingOptions
from actqkv_cpp.document import (
    GAP,
    Beginning,
    Conversation,
    Document,
    Progress,
    Source,
    beginning,
    template,
    text_files,
    texts,
)
from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.reader import TextFile
from actqkv_cpp.reading import Place, Reading
from actqkv_cpp.results import Answer
from actqkv_cpp.template import Cursor, Part, Tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from actqkv_cpp.config import Retrieval
    from actqkv_cpp.llama import Llama


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `tokens` [n] are those of the answer that the session holds, for replaying it."""

    question: str
    answer: str
    tokens: Tokens


@dataclass(frozen=True)
class _Step:
    """What a conversation grew by, and where it stands since."""

    what: Reading | Turn
    after: Place


class Chat(Conversation):
    """A conversation over one session, over documents or none; a turn sees those before it. Made by `Llama.chat`.

    Attributes:
        llm: the Llama whose session holds it.
        answer: of the latest turn; None where there is none, or it was broken off.

    Example:
        >>> chat = llm.chat("book.txt")
        >>> chat.say("Who kept the key?")
        >>> chat.say("Where?").text
    """

    def __init__(self, llm: Llama, document: Document | None, *, system: str | None = None) -> None:
        super().__init__(llm)
        self.answer: Answer | None = None
        self._system = system
        begin = beginning(llm, [Part(system)] if system else [], [])
        self._origin = replace(begin.done, before=begin.head + begin.closing)
        self._steps: list[_Step] = []
        if document is not None:
            self._origin = document._reading.place
            self._append(replace(document._reading))  # the document may be read on, this stays where it is

    def _here(self) -> Place:
        return self._steps[-1].after if self._steps else self._origin

    def _until(self, n_turns: int) -> list[_Step]:
        """The first turns, and documents read before the next."""
        turns = [i for i, step in enumerate(self._steps) if isinstance(step.what, Turn)]
        return self._steps[: [*turns, len(self._steps)][n_turns]]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far."""
        return tuple(step.what for step in self._steps if isinstance(step.what, Turn))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, as {"role": "user" or "assistant", "content": text}."""
        said = ((("user", turn.question), ("assistant", turn.answer)) for turn in self.turns)
        return [{"role": role, "content": text} for pair in said for role, text in pair]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """How documents were read, in order; `n_read` is less than `n_total` where that was interrupted."""
        return tuple(step.what for step in self._steps if isinstance(step.what, Reading))

    @property
    def documents(self) -> list[str]:
        """Names of the documents read, in order."""
        return [file.name for file in self._here().files]

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation in the session."""
        return self._here().cursor.n_past

    def say(
        self,
        text: str,
        *,
        retrieval: Retrieval | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """One turn: `text` is the user's; question and answer stay in the conversation.

        Arguments and errors as in `Document.ask`; StateError where documents are `missing`. Interrupting
        (KeyboardInterrupt) keeps the turn with the answer so far, as soon as the question was read; before that, the
        turn never was.
        """
        how = Sampling.of(**sampling)
        self._return(self._steps)
        said, answer = Generated(), None
        try:
            answer = self._answer(self._here(), text, how, said, reading=self._latest(), retrieval=retrieval)
            return answer
        finally:
            if said.first_token_at is not None:
                self.answer = answer
                self._append(Turn(text, said.text, self.llm.input_ids[said.n_prompt : self.llm.n_tokens].copy()))

    def ask(
        self,
        question: str,
        *,
        retrieval: Retrieval | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """An aside: answered from the conversation so far and then forgotten; later turns do not see it.

        Arguments and errors as in `Document.ask`.
        """
        how = Sampling.of(**sampling)
        self._return(self._steps)
        return self._answer(self._here(), question, how, Generated(), reading=self._latest(), retrieval=retrieval)

    def _latest(self) -> Reading | None:
        return self.readings[-1] if self.readings else None

    def _after_answer(self, place: Place) -> Place:
        """The place after an answer: nothing of it is open, the next turn brings the template's end of it."""
        llm = self.llm
        before, after = llm._template.following()
        if llm.session is not None:
            llm.session.checkpoint()
        history = llm.input_ids[: llm.n_tokens].copy()
        return replace(
            place, cursor=Cursor(llm.n_tokens), before=template(before), after=template(after), history=history
        )

    def read(
        self,
        source: Source = None,
        *,
        text: str | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Add a document to the running conversation; later turns see it beside all before it. One that nothing stands
        before is written to the Llama's KV file, if it has one.

        Args:
            source: as in `Llama.read`; of a KV file the documents are read once more, as its keys and values hold only
                for a session that begins with it (`Llama.open`).
            text, name, progress: as in `Llama.read`.

        Raises:
            as `Llama.read`; an interrupted reading keeps what was read of the document, and `resume` reads on.

        Example:
            >>> chat.read("second.txt")
        """
        files = text_files(source, text, name, kv_files=True)
        self._return(self._steps)
        place = self._here()
        content = texts(files, before=place.files)
        inserted = self.llm._template.inserted() if self.turns else None
        if not place.cursor.n_past:
            begin = beginning(self.llm, [Part(self._system + GAP), *content] if self._system else content, files)
        elif inserted is not None:
            begin = Beginning(
                (*template(inserted[0]), *content),
                template(inserted[1]),
                replace(place, before=(), after=template(inserted[2])),
            )
        else:
            begin = Beginning((*place.before, *content), (Part(GAP),), replace(place, before=()))
        done = replace(begin.done, files=place.files + tuple(files))
        self._check_history(place)
        reading = self._plan(place, begin.head, begin.closing, done, reserve=None)
        self._read_behind(self._steps, reading, progress)

    def resume(self, *, progress: Progress | None = None) -> None:
        """Read on where the latest interrupted reading stopped, into the Llama's KV file where that was being written;
        nothing to do where none was interrupted.

        Turns and documents after it are forgotten: they would stand in the middle of what is read.

        Args:
            progress: as in `Llama.read`; counts from what was read before.

        Raises:
            as `Llama.read`; nothing is forgotten where StateError is raised.
        """
        readings = [(at, step.what) for at, step in enumerate(self._steps) if isinstance(step.what, Reading)]
        stopped = [(at, reading) for at, reading in readings if reading.n_read < reading.n_total]
        if not stopped:
            return
        at, reading = stopped[-1]
        before, n_turns = self._steps[:at], len(self.turns)
        self._return(before)
        held = self._as_held(reading)
        try:
            self._read_behind(before, held, progress)
        finally:
            self.answer = self.answer if len(self.turns) == n_turns else None

    def _read_behind(self, steps: Sequence[_Step], reading: Reading, progress: Progress | None) -> None:
        """Read what is left of `reading`; the conversation is `steps` and it then, however the reading ends."""
        with saved.written(self.llm, reading):
            try:
                self._read(reading, progress)
            finally:
                self._steps = list(steps)
                self._append(reading)

    def _as_held(self, reading: Reading) -> Reading:
        """A reading of the same, as far as the session holds it."""
        n = min(len(reading.history), self.llm.n_tokens)
        differ = np.flatnonzero(reading.history[:n] != self.llm.input_ids[:n])
        n_held = int(differ[0]) if len(differ) else n
        return replace(reading, n_read=max(n_held - reading.step.keep, 0))

    @property
    def documents_by_turn(self) -> list[tuple[TextFile, ...]]:
        """The documents read before each turn, and before the next."""
        steps = (self._until(n) for n in range(len(self.turns) + 1))
        return [some[-1].after.files if some else () for some in steps]

    def undo(self) -> None:
        """Forget the last turn (question and answer), and documents read after it. StateError when there is none."""
        if not self.turns:
            raise StateError("there is no turn to undo", "ask something first")
        self._steps = self._until(len(self.turns) - 1)
        self.answer = None

    def branch(self, n_turns: int | None = None) -> Chat:
        """A second conversation that begins with the first turns of this one. Both go on as they like: turns that the
        session lacks, the other's having replaced them, are fed to it again; documents are by `restore`.

        Args:
            n_turns: turns to keep, with the documents read before the next; None: all.

        Raises:
            ParameterError: there are not so many.

        Example:
            >>> other = chat.branch(1)  # as it was after the first turn
        """
        last = len(self.turns)
        n = last if n_turns is None else n_turns
        if not 0 <= n <= last:
            raise ParameterError(f"there is no turn {n}, the last is {last}", "count the turns from 1")
        other = copy.copy(self)
        other._steps = self._until(n)
        other.answer = self.answer if n == last else None
        return other

    def replay(self, question: str, answer: str, tokens: Sequence[int]) -> None:
        """Take up a turn as it was held elsewhere: its tokens are fed, nothing is generated.

        Args:
            question, answer, tokens: of a `Turn`.

        Raises:
            ContextError: it does not fit n_ctx; the turn never was.
            ParameterError: a token is none of this model's.
        """
        turn = Turn(question, answer, np.array(tokens, np.int32))
        self._return(self._steps)
        self._feed_again(self._here(), turn)
        self._append(turn)

    def _append(self, what: Reading | Turn) -> None:
        """What the session holds behind `_here` is part of the conversation."""
        after = what.here() if isinstance(what, Reading) else self._after_answer(self._here())
        self._steps = [*self._steps, _Step(what, after)]

    def _feed_again(self, place: Place, turn: Turn) -> None:
        self._feed_question(place, turn.question, sources=False)
        self.llm._feed(turn.tokens, phase="decode")

    @property
    def missing(self) -> list[str]:
        """Names of documents that the session no longer holds, since another conversation took their place."""
        return _names(self._lost(self._steps))

    def restore(self, *, progress: Progress | None = None) -> None:
        """Have the session hold this conversation again: `missing` documents are read again, turns fed again.

        Args:
            progress: as in `Llama.read`; counts the tokens of those documents.

        Raises:
            Cancelled, KeyboardInterrupt: the next `restore` goes on from there.

        Example:
            >>> if chat.missing:
            ...     chat.restore(progress=print)
        """
        self._bring_back(self._lost(self._steps), progress)

    def _return(self, steps: Sequence[_Step]) -> None:
        """Have the session hold `steps`, where it holds only their beginning and turns are all that is lost."""
        lost = self._lost(steps)
        if names := _names(lost):
            raise StateError(
                f"{', '.join(names)}: in the session no longer, another conversation took the place of it",
                "restore() reads it again",
            )
        self._bring_back(lost, None)

    def _lost(self, steps: Sequence[_Step]) -> list[tuple[Place, Reading | Turn]]:
        """What of `steps` the session does not hold, each with the place that it began at."""
        places = [self._origin, *(step.after for step in steps)]
        first = next(i for i in reversed(range(len(places))) if self._holds(places[i]))
        return [(place, step.what) for place, step in zip(places[first:], steps[first:], strict=False)]

    def _bring_back(self, lost: Sequence[tuple[Place, Reading | Turn]], progress: Progress | None) -> None:
        done, total = 0, sum(what.n_read for _, what in lost if isinstance(what, Reading))

        def report(n_done: int, n: int) -> object:
            return None if progress is None else progress(done + min(n_done, n), total)

        for place, what in lost:
            if isinstance(what, Reading):
                part = replace(what.step, tokens=what.step.tokens[: what.n_read])
                self._read(replace(self._as_held(what), step=part), report)
                done += what.n_read
                continue
            self._feed_again(place, what)
            if self.llm.session is not None:
                self.llm.session.checkpoint()

    def reset(self) -> None:
        """Forget all turns, and documents read between them; those that came before the first turn stay read."""
        self._steps = self._until(0)
        self.answer = None


def _names(steps: Sequence[tuple[Place, Reading | Turn]]) -> list[str]:
    """The documents that were read there."""
    readings = [what for _, what in steps if isinstance(what, Reading)]
    return [file.name for reading in readings for file in reading.done.files[len(reading.place.files) :]]
