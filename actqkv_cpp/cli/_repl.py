"""The conversation of `actqkv chat`: one line at a time, a question or a /command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from actqkv_cpp import reader
from actqkv_cpp.cli import _errors
from actqkv_cpp.cli._interrupt import Interrupt
from actqkv_cpp.cli._options import SamplingOptions, check_text
from actqkv_cpp.cli._output import Output, answer_figures
from actqkv_cpp.cli._session import Reading, read_with_progress
from actqkv_cpp.cli._terminal import Lines
from actqkv_cpp.cli._transcript import Transcript, Turn
from actqkv_cpp.errors import ParameterError, unknown_name

if TYPE_CHECKING:
    from actqkv_cpp import Answer, Chat


@dataclass(frozen=True)
class Command:
    """A line that begins with /."""

    usage: str
    help: str
    run: Callable[[Repl, str], object]


class Repl:
    """A chat over a loaded model.

    Args:
        chat: the conversation, over `llm.document` where there is one.
        reading: how far the reading of that document went.
    """

    def __init__(
        self,
        output: Output,
        lines: Lines,
        chat: Chat,
        *,
        sampling: SamplingOptions,
        reading: Reading | None,
    ) -> None:
        self._output = output
        self._lines = lines
        self._llm = chat.llm
        self._chat = chat
        self._sampling = sampling
        self._readings = [reading] if reading else []
        self._turns: list[Turn] = []
        self._saved: set[Path] = set()
        self._leaving = False

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
        with Interrupt() as stop, self._output.answering() as show:

            def on_text(piece: str) -> bool:
                show(piece)
                return not stop.requested

            answer = how(text, on_text=on_text, **self._sampling.arguments())
        self._turns.append(Turn(kind, answer))
        self._output.answer_note(answer)
        for reading in self._readings:
            if not reading.complete:
                self._output.note(f"known of {reading.names}: the first {reading.done:,} of {reading.total:,} tokens")

    # -- commands

    def help(self, rest: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self._output.note(f"{command.usage:{width}}  {command.help}")

    def read(self, name: str) -> None:
        if name:
            file = reader.load(Path(name).expanduser())
            add = self._chat.read
            reading = read_with_progress(self._output, file.name, lambda progress: add(file, progress=progress))
            self._readings.append(reading)
        else:
            self._read_on()

    def _read_on(self) -> None:
        """Finish the reading of -d. What was said on its first part is forgotten: it would stand in the middle."""
        document = self._llm.document
        if document is None or document.tokens_read >= document.tokens_total:
            raise ParameterError("/read needs a file", COMMANDS["/read"].usage)
        names = ", ".join(document.names)
        reading = read_with_progress(
            self._output,
            names,
            lambda progress: document.resume(progress=progress),
            already=document.tokens_read,
        )
        self._readings = [reading]
        if self._chat.messages:
            self._output.note("the conversation starts again")
        self._chat = self._llm.chat(document)

    def ask(self, question: str) -> None:
        if not question:
            raise ParameterError("/ask needs a question", COMMANDS["/ask"].usage)
        self._answer("ask", self._chat.ask, question)

    def sources(self, rest: str) -> None:
        answer = self._last_answer()
        if not answer.sources:
            self._output.note("no passages are known of the last answer")
        self._output.sources(answer.sources)

    def stats(self, rest: str) -> None:
        self._output.note(f"context: {self._llm.n_tokens:,} of {self._llm.n_ctx():,} tokens used")
        for reading in self._readings:
            self._output.note(str(reading))
        for line in answer_figures(self._turns[-1].answer) if self._turns else ():
            self._output.note(line)

    def reset(self, rest: str) -> None:
        self._chat.reset()
        self._turns.clear()
        self._output.note("the conversation starts again; documents read before it stay")

    def save(self, name: str) -> None:
        if not name:
            raise ParameterError("/save needs a file", COMMANDS["/save"].usage)
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

    def quit(self, rest: str) -> None:
        self._leaving = True

    def _last_answer(self) -> Answer:
        if not self._turns:
            raise ParameterError("there is no answer yet", "ask something first")
        return self._turns[-1].answer


COMMANDS = {
    "/help": Command("/help", "Show this.", Repl.help),
    "/read": Command("/read [FILE]", "Read another document; without FILE, read on where Ctrl-C stopped.", Repl.read),
    "/ask": Command("/ask QUESTION", "Ask aside: the conversation does not remember it.", Repl.ask),
    "/sources": Command("/sources", "Show the passages that the last answer came from.", Repl.sources),
    "/stats": Command("/stats", "Show tokens, memory and speed.", Repl.stats),
    "/reset": Command("/reset", "Forget the conversation; documents stay read.", Repl.reset),
    "/save": Command("/save FILE", "Save the conversation: JSON where FILE ends in .json, else Markdown.", Repl.save),
    "/quit": Command("/quit", "Leave; so does Ctrl-D.", Repl.quit),
}
