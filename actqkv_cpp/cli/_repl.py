"""The conversation of `actqkv chat`: one line at a time, a question or a /command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import actqkv_cpp
from actqkv_cpp import reader
from actqkv_cpp.cli import _errors
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._options import SamplingOptions, check_text
from actqkv_cpp.cli._output import Output, answer_figures, shorten
from actqkv_cpp.cli._saved import ReadEvent, SavedChat, TurnEvent, events_of, is_name
from actqkv_cpp.cli._saved import save as save_chat
from actqkv_cpp.cli._session import (
    STDIN,
    load_document,
    names_of,
    note_again,
    progress_of,
    read_with_progress,
    unfinished,
)
from actqkv_cpp.cli._terminal import Lines
from actqkv_cpp.cli._transcript import Transcript, Turn
from actqkv_cpp.errors import ParameterError, unknown_name
from actqkv_cpp.reader import TextFile

if TYPE_CHECKING:
    from actqkv_cpp import Answer, Chat
    from actqkv_cpp.reading import Reading


@dataclass(frozen=True)
class Command:
    """A line that begins with /."""

    usage: str
    help: str
    run: Callable[[Repl, str], object]


@dataclass
class Branch:
    """A conversation that shares its beginning with others; `answers` of its turns and of asides."""

    chat: Chat
    answers: list[Turn]

    def until(self, n_turns: int) -> list[Turn]:
        """Answers of the first `n_turns`, and asides."""
        return [turn for turn in self.answers if turn.number is None or turn.number < n_turns]


class Repl:
    """A chat over a loaded model.

    Args:
        chat: the conversation, over the documents of -d.
        documents: of -d, as `/save NAME` remembers them; `system` likewise.
    """

    def __init__(
        self,
        output: Output,
        lines: Lines,
        chat: Chat,
        *,
        sampling: SamplingOptions,
        documents: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        self._output = output
        self._lines = lines
        self._llm = chat.llm
        self._branches = [Branch(chat, [])]
        self._at = 0  # of the branches
        self._sampling = sampling
        self._documents = tuple(documents)
        self._n_given = len(chat.readings[-1].done.files) if chat.readings else 0
        self._system = system
        self._kv_files: dict[str, str] = {}  # that documents were taken out of, by their digests
        self._saved: set[Path] = set()  # files of this chat's own, which it may overwrite
        self._names: set[str] = set()  # of /save NAME, likewise
        self._leaving = False

    @property
    def _chat(self) -> Chat:
        return self._branches[self._at].chat

    @property
    def _turns(self) -> list[Turn]:
        return self._branches[self._at].answers

    def take_up(self, saved: SavedChat, files: dict[str, TextFile]) -> None:
        """Have the conversation be what was saved, whose first documents are read already.

        Args:
            files: documents read between turns, by digest.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped a reading, so that what follows cannot be taken up.
        """
        self._names.add(saved.name)
        for _, some in groupby(saved.events[len(self._chat.documents) :], _taken_with):
            event, *more = some
            if isinstance(event, ReadEvent):
                reads = [event, *(other for other in more if isinstance(other, ReadEvent))]
                self._take(event.path, [files[read.sha256] for read in reads])
                if unfinished(self._chat):
                    raise KeyboardInterrupt
                continue
            number = len(self._chat.turns)
            self._chat.replay(event.question, event.answer, event.tokens)
            self._turns.append(Turn("chat", event.question, event.answer, event.details, number))
        self._output.note(f"gone on with, {self._where()}")

    def run(self) -> None:
        """Until /quit or the end of input."""
        while not self._leaving:
            try:
                line = self._lines.next().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._output.note("/quit or Ctrl-D leaves")
                continue
            if line:
                self._handle(line)

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name not in COMMANDS:
                    raise unknown_name("command", name, COMMANDS)
                COMMANDS[name].run(self, rest.strip())
            else:
                self._answer("chat", self._chat.say, line)
        except KeyboardInterrupt:
            self._output.note("stopped")
        except BrokenPipeError:
            raise
        except Exception as error:
            _errors.show(self._output, error)

    def _answer(self, kind: Literal["chat", "ask"], how: Callable[..., Answer], text: str) -> None:
        check_text(text, "the question")
        self._restore()
        chat, number = self._chat, len(self._chat.turns)
        answer: Answer | None = None
        try:
            with Interrupt() as stop, self._output.answering() as show:

                def on_text(piece: str) -> bool:
                    show(piece)
                    return not stop.requested

                answer = how(text, on_text=on_text, **self._sampling.arguments())
        finally:
            if answer is not None:
                at = number if kind == "chat" else None
                self._turns.append(Turn(kind, answer.question, answer.text, answer, at))
            elif chat.turns[number:]:  # broken off, but part of the conversation
                self._turns.append(Turn(kind, text, chat.turns[number].answer, None, number))
        self._output.answer_note(answer)
        for reading in unfinished(self._chat):
            self._output.note(
                f"known of {names_of(reading)}: the first {reading.n_read:,} of {reading.n_total:,} tokens"
            )

    # -- commands

    def help(self, rest: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self._output.note(f"{command.usage:{width}}  {command.help}")

    def read(self, name: str) -> None:
        if not name:
            self._read_on()
            return
        path = _typed(name)
        self._take(path, load_document(path))

    def _take(self, path: str, files: list[TextFile]) -> None:
        """Read the documents of a file."""
        if reader.is_kv_file(path):
            self._kv_files |= {file.sha256: path for file in files}
            note_again(self._output, self._llm, path, files)
        self._restore()
        names, chat = ", ".join(file.name for file in files), self._chat
        if not read_with_progress(self._output, names, lambda progress: chat.read(files, progress=progress)):
            self._output.note("/read reads on")

    def _read_on(self) -> None:
        chat = self._chat
        stopped, before, n_turns = unfinished(chat), chat.readings, len(chat.turns)
        if not stopped:
            raise ParameterError("/read needs a file: no reading was stopped", COMMANDS["/read"].usage)
        self._restore()
        try:
            read_with_progress(
                self._output,
                names_of(stopped[-1]),
                lambda progress: chat.resume(progress=progress),
                already=stopped[-1].n_read,
            )
        finally:
            if len(chat.turns) < n_turns:
                self._output.note(f"what was said without the rest is forgotten; {self._where()}")
            self._forget(before)

    def _restore(self) -> None:
        """Read documents again whose place another branch took.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped that; the next time goes on from there.
        """
        chat = self._chat
        if not chat.missing:
            return
        names = ", ".join(chat.missing)
        self._output.note(f"read again, as another branch took its place: {names}")
        if not read_with_progress(self._output, names, lambda progress: chat.restore(progress=progress)):
            raise KeyboardInterrupt

    def _forget(self, before: Sequence[Reading]) -> None:
        """Say which documents went with the end of the conversation, and drop the answers that did.

        Args:
            before: its readings until then.
        """
        here = self._branches[self._at]
        here.answers = here.until(len(here.chat.turns))
        if gone := before[len(here.chat.readings) :]:
            names = ", ".join(names_of(reading) for reading in gone)
            self._output.note(f"no longer read, as it came after that: {names}; /read FILE reads a document again")

    def ask(self, question: str) -> None:
        if not question:
            raise ParameterError("/ask needs a question", COMMANDS["/ask"].usage)
        self._answer("ask", self._chat.ask, question)

    def sources(self, rest: str) -> None:
        if not self._turns:
            raise ParameterError("there is no answer yet", "ask something first")
        if not self._turns[-1].sources:
            self._output.note("no passages are known of the last answer")
        self._output.sources(self._turns[-1].sources)

    def stats(self, rest: str) -> None:
        self._output.note(f"context: {self._llm.n_tokens:,} of {self._llm.n_ctx():,} tokens used")
        for reading in self._chat.readings:
            self._output.note(progress_of(names_of(reading), reading.n_read, reading.n_total, reading.seconds))
        if self._llm.gpu.there:
            self._output.note(f"attention on {self._llm.gpu}")
        details = self._turns[-1].details if self._turns else None
        for line in answer_figures(details) if details else ():
            self._output.note(line)

    def reset(self, rest: str) -> None:
        before = self._chat.readings
        self._chat.reset()
        self._turns.clear()
        self._output.note("the conversation starts again; documents read before it stay")
        self._forget(before)

    def undo(self, rest: str) -> None:
        before = self._chat.readings
        self._chat.undo()
        self._output.note(f"forgotten; {self._where()}")
        self._forget(before)

    def edit(self, question: str) -> None:
        if not question:
            raise ParameterError("/edit needs the question as it should have been", COMMANDS["/edit"].usage)
        here = self._branches[self._at]
        if not here.chat.turns:
            raise ParameterError("there is no turn to edit", "ask something first")
        n_before = len(here.chat.turns) - 1
        edited = Branch(here.chat.branch(n_before), here.until(n_before))
        if lost := here.chat.readings[len(edited.chat.readings) :]:
            names = ", ".join(names_of(reading) for reading in lost)
            raise ParameterError(
                f"/edit would drop what was read after the last question: {names}", "ask anew, or /undo drops both"
            )
        self._branches[self._at] = edited
        try:
            self._answer("chat", edited.chat.say, question)
        finally:
            if len(edited.chat.turns) == n_before:  # the question never was, so the old one stays
                self._branches[self._at] = here

    def branch(self, number: str) -> None:
        if not number:
            self._list_branches()
            return
        if not number.isdecimal():
            raise ParameterError(f"/branch needs the number of a turn, not {number!r}", "/branch lists the turns")
        here, n_turns = self._branches[self._at], int(number)
        self._branches.append(Branch(here.chat.branch(n_turns), here.until(n_turns)))
        self._at = len(self._branches) - 1
        self._output.note(f"branch {self._at + 1}; {self._where()}; /switch {self._branches.index(here) + 1} goes back")

    def switch(self, number: str) -> None:
        if not number.isdecimal():
            raise ParameterError(f"/switch needs the number of a branch, not {number!r}", "/branch lists them")
        if not 1 <= int(number) <= len(self._branches):
            raise ParameterError(
                f"there is no branch {number}, the last is {len(self._branches)}", "/branch lists them"
            )
        self._at = int(number) - 1
        self._output.note(f"branch {number}; {self._where()}")

    def _list_branches(self) -> None:
        for i, branch in enumerate(self._branches):
            here = " (here)" if i == self._at else ""
            n_turns = len(branch.chat.turns)
            self._output.note(f"branch {i + 1}{here}: {n_turns} turn{'s' if n_turns != 1 else ''}")
        for i, turn in enumerate(self._chat.turns, 1):
            self._output.note(f"  {i}  {shorten(' '.join(turn.question.split()), 60)}")

    def _where(self) -> str:
        turns = self._chat.turns
        return (
            f"after turn {len(turns)}: {shorten(' '.join(turns[-1].question.split()), 60)}" if turns else "no turns yet"
        )

    def save(self, name: str) -> None:
        if not name:
            raise ParameterError("/save needs a name, or a file", COMMANDS["/save"].usage)
        if is_name(name):
            self._save_chat(name)
            return
        path = Path(name).expanduser()
        transcript = Transcript(
            model=Path(self._llm.model_path).name,
            method=self._llm.retrieval.method,
            documents=tuple(self._chat.documents),
            turns=tuple(self._turns),
        )
        transcript.save(path, overwrite=path.resolve() in self._saved)
        self._saved.add(path.resolve())
        self._output.note(f"saved {len(self._turns)} answers to {path}")

    def _save_chat(self, name: str) -> None:
        """To go on another day."""
        if STDIN in self._documents:
            raise ParameterError("a document from standard input could not be read again", "save it in a file first")
        if stopped := unfinished(self._chat):
            raise ParameterError(f"{names_of(stopped[-1])} is not read whole", "/read reads on")
        details = {turn.number: turn.details for turn in self._turns if turn.number is not None and turn.details}
        path = Path(self._llm.model_path)
        bundled = path == actqkv_cpp.default_model_path()
        save_chat(
            SavedChat(
                name=name,
                model=None if bundled else str(path.resolve()),
                model_bytes=path.stat().st_size,
                system=self._system,
                documents=tuple(str(Path(document).absolute()) for document in self._documents),
                events=events_of(self._chat, self._n_given, details, self._kv_files),
            ),
            overwrite=name in self._names,
        )
        self._names.add(name)
        self._output.note(f"saved; actqkv chat --resume {name} goes on")

    def quit(self, rest: str) -> None:
        self._leaving = True


def _typed(name: str) -> str:
    """The path that was typed, as it is or, where there is no such file, as a shell would take it: terminals paste what
    is dropped on them with quotes or backslashes."""
    path = os.path.expanduser(name)
    try:
        words = shlex.split(name)
    except ValueError:  # a quote that does not end
        return path
    return path if os.path.exists(path) or len(words) != 1 else os.path.expanduser(words[0])


def _taken_with(event: ReadEvent | TurnEvent) -> object:
    """The same for the documents of one KV file, which are one reading; else of the event alone."""
    return event.path if isinstance(event, ReadEvent) and reader.is_kv_file(event.path) else id(event)


COMMANDS = {
    "/help": Command("/help", "Show this.", Repl.help),
    "/read": Command("/read [FILE]", "Read another document; without FILE, read on where Ctrl-C stopped.", Repl.read),
    "/ask": Command("/ask QUESTION", "Ask aside: the conversation does not remember it.", Repl.ask),
    "/sources": Command("/sources", "Show the passages that the last answer came from.", Repl.sources),
    "/stats": Command("/stats", "Show tokens, memory and speed.", Repl.stats),
    "/undo": Command("/undo", "Forget the last question, its answer, and documents read after it.", Repl.undo),
    "/edit": Command("/edit QUESTION", "Ask this in place of the last question.", Repl.edit),
    "/branch": Command("/branch [N]", "Go on from turn N apart; without N, list branches and turns.", Repl.branch),
    "/switch": Command("/switch B", "Go to branch B.", Repl.switch),
    "/reset": Command("/reset", "Forget the conversation; documents read before it stay.", Repl.reset),
    "/save": Command(
        "/save NAME|FILE",
        "Save the conversation: NAME for actqkv chat --resume; FILE.json, or FILE.md and others, to read.",
        Repl.save,
    ),
    "/quit": Command("/quit", "Leave; so does Ctrl-D.", Repl.quit),
}
