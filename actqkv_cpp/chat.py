"""Conversations over documents or none: `Chat`, made by `Llama.chat`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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


class Chat(Conversation):
    """A conversation over one session, over documents or none; a turn sees those before it. Made by `Llama.chat`.

    Attributes:
        llm: the Llama whose session holds it.
        messages: the turns so far, as {"role": "user" or "assistant", "content": text}.
        answer: the latest Answer, or None.

    Example:
        >>> chat = llm.chat("book.txt")
        >>> chat.say("Who kept the key?")
        >>> chat.say("Where?").text
    """

    def __init__(self, llm: Llama, document: Document | None, *, system: str | None = None) -> None:
        super().__init__(llm)
        self.messages: list[dict[str, str]] = []
        self.answer: Answer | None = None
        self._reading: Reading | None = document._reading if document else None
        if document is not None:
            self._place = document._reading.here()
        else:
            begin = beginning(llm, [Part(system)] if system else [], [])
            self._place = replace(begin.done, before=begin.head + begin.closing)
        self._system = system
        self._start = self._place
        self._turns: list[Place] = []  # where each began
        self._said: list[Turn] = []

    def _here(self) -> Place:
        return self._place

    @property
    def documents(self) -> list[str]:
        """Names of the documents read, in order."""
        return [file.name for file in self._place.files]

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation in the session."""
        return self._place.cursor.n_past

    def say(
        self,
        text: str,
        *,
        retrieval: Retrieval | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """One turn: `text` is the user's; question and answer stay in the conversation.

        Arguments and errors as in `Document.ask`. Interrupting (KeyboardInterrupt) keeps the turn with the answer so
        far, as soon as the question was read; before that, the turn never was.
        """
        how = Sampling.of(**sampling)
        self._return()
        said = Generated()
        try:
            self.answer = self._answer(self._place, text, how, said, reading=self._reading, retrieval=retrieval)
            return self.answer
        finally:
            if said.first_token_at is not None:
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
        self._return()
        return self._answer(self._place, question, how, Generated(), reading=self._reading, retrieval=retrieval)

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
        """Add a document to the running conversation; later turns see it beside all before it.

        Args:
            source: as in `Llama.read`; of a KV file the documents are read once more, as its keys and values hold only
                for a session that begins with it (`Llama.open`).
            text, name, progress: as in `Llama.read`.

        Raises:
            as `Llama.read`; an interrupted reading keeps what was read of the document.

        Example:
            >>> chat.read("second.txt")
        """
        files = text_files(source, text, name, kv_files=True)
        self._return()
        place = self._place
        content = texts(files, first=len(place.files))
        inserted = self.llm._template.inserted() if self._turns else None
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
        try:
            self._read(reading, progress)
        finally:
            self._place, self._reading = reading.here(), reading
            if not self._turns:
                self._start = self._place

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far."""
        return tuple(self._said)

    @property
    def documents_by_turn(self) -> list[tuple[TextFile, ...]]:
        """The documents read before each turn, and before the next."""
        return [place.files for place in [*self._turns, self._place]]

    def undo(self) -> None:
        """Forget the last turn (question and answer), and documents read after it. StateError when there is none."""
        if not self._turns:
            raise StateError("there is no turn to undo", "ask something first")
        self._place = self._turns.pop()
        self._said.pop()
        del self.messages[-2:]
        self.answer = None

    def branch(self, n_turns: int | None = None) -> Chat:
        """A second conversation that begins with the first turns of this one. Both go on as they like: turns that the
        session lacks, the other's having replaced them, are fed to it again. Documents are not.

        Args:
            n_turns: turns to keep, with the documents read before the next; None: all.

        Raises:
            ParameterError: there are not so many.

        Example:
            >>> other = chat.branch(1)  # as it was after the first turn
        """
        n = len(self._turns) if n_turns is None else n_turns
        if not 0 <= n <= len(self._turns):
            raise ParameterError(f"there is no turn {n}, the last is {len(self._turns)}", "count the turns from 1")
        other = copy.copy(self)
        other._place = [*self._turns, self._place][n]
        other._turns, other._said, other.messages = self._turns[:n], self._said[:n], self.messages[: 2 * n]
        other.answer = self.answer if n == len(self._turns) else None
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
        self._return()
        self._feed_again(self._place, turn)
        self._append(turn)

    def _append(self, turn: Turn) -> None:
        """The turn that the session holds after `_place` is part of the conversation."""
        self._turns.append(self._place)
        self._said.append(turn)
        self.messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        self._place = self._after_answer(self._place)

    def _feed_again(self, place: Place, turn: Turn) -> None:
        self._feed_question(place, turn.question, sources=False)
        self.llm._feed(turn.tokens, phase="decode")

    def _return(self) -> None:
        """Have the session hold this conversation, where it holds only its beginning: as if it had just been held."""
        places = [*self._turns, self._place]
        last = next((i for i in reversed(range(len(places))) if self._holds(places[i])), len(places) - 1)
        for i in range(last, len(self._said)):
            if places[i].files != places[i + 1].files:
                raise StateError("a document that was read in this branch is in the session no longer", "read it again")
            self._feed_again(places[i], self._said[i])
            if self.llm.session is not None:
                self.llm.session.checkpoint()

    def reset(self) -> None:
        """Forget all turns, and documents read between them; those that came before the first turn stay read."""
        self._place = self._start
        self._turns, self._said, self.messages = [], [], []
        self.answer = None
