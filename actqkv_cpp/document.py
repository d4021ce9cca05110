"""Reading documents and asking about them: `Document`, made by `Llama.read` and `open`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import results, saved, sources
from actqkv_cpp.answering import Generated, Sampling, SamplingOptions, generate
from actqkv_cpp.errors import ContextError, DocumentError, ParameterError, StateError
from actqkv_cpp.reader import TextFile, check_words, headings, is_kv_file, load
from actqkv_cpp.reading import QUESTION, Place, Reading
from actqkv_cpp.results import Answer, Memory
from actqkv_cpp.template import Cursor, Part, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from actqkv_cpp.config import Retrieval
    from actqkv_cpp.llama import Llama

Progress: TypeAlias = Callable[[int, int], object]  # (tokens done, tokens in all); returning False stops
PathLike: TypeAlias = str | Path
Source: TypeAlias = PathLike | TextFile | Sequence[PathLike | TextFile] | None  # what `Llama.read` reads

_RESERVE = 1024  # tokens kept free for question and answer while reading, at most an eighth of n_ctx
GAP = "\n\n"  # between texts that share one message


class Conversation:
    """What `Document` and `Chat` share: reading into, and answering from, the session of one Llama."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm

    def _here(self) -> Place:
        """Where the next turn starts."""
        raise NotImplementedError

    @property
    def files(self) -> tuple[TextFile, ...]:
        """The documents themselves (`name`, `text`)."""
        return self._here().files

    def token_ends(self, document: int = 0) -> tuple[int, NDArray[np.int64]]:
        """Where a document lies: its first token's position in the session, and the character of its text at which each
        of its tokens ends. Of an interrupted reading, what was read.

        Args:
            document: number among those read.

        Example:
            >>> start, ends = doc.token_ends()
            >>> doc.text[: ends[9]]  # the first ten tokens
        """
        place = self._here()
        for span in place.spans:
            if span.document == document:
                return span.start, sources.character_ends(place.files[document].text, span.ends)
        return place.cursor.n_past, np.zeros(0, np.int64)

    def _holds(self, place: Place) -> bool:
        """Whether the session's history begins with that of `place`."""
        n = place.cursor.n_past
        return n <= self.llm.n_tokens and np.array_equal(self.llm.input_ids[:n], place.history[:n])

    def _check_history(self, place: Place) -> None:
        if not self._holds(place):
            raise StateError(
                "the session was used for something else since this was read",
                "read the document again; one Llama holds one history",
            )

    def _read(self, reading: Reading, progress: Progress | None) -> None:
        """Read what is left of `reading`; on any exception its `n_read` says how far that went."""
        llm, keep = self.llm, reading.step.keep
        begin = time.perf_counter()
        llm._rewind(keep + reading.n_read)
        try:
            for tokens, phase in reading.segments():
                done = llm.n_tokens - keep

                def report(n_done: int, _: int, done: int = done) -> object:
                    return None if progress is None else progress(done + n_done, reading.n_total)

                llm._feed(tokens, phase=phase, progress=report)
        finally:
            reading.n_read = max(llm.n_tokens - keep, 0)
            reading.seconds += time.perf_counter() - begin
            reading.history = llm.input_ids[: llm.n_tokens].copy()
        if llm.session is not None:
            llm.session.checkpoint()

    def _answer(
        self,
        place: Place,
        text: str,
        sampling: Sampling,
        into: Generated,
        *,
        reading: Reading | None,
        retrieval: Retrieval | None,
    ) -> Answer:
        """Ask `text` at `place`, after `reading`; the session then holds both. `into` grows as the answer does."""
        with self.llm.answering(retrieval):
            return self._answer_now(place, text, sampling, into, reading)

    def _answer_now(
        self, place: Place, text: str, sampling: Sampling, into: Generated, reading: Reading | None
    ) -> Answer:
        llm, session = self.llm, self.llm.session
        begin = time.perf_counter()
        step = self._feed_question(place, text)
        prompt_s = time.perf_counter() - begin
        n_prompt = into.n_prompt = step.keep + len(step.tokens)
        passages: tuple[results.Source, ...] = ()
        dense_max, on_gpu = 0, None
        if session is None:
            generate(llm, into, sampling)
            attended_max, n_steps = llm.n_tokens, llm.n_tokens - n_prompt  # a step attends all before it and itself
            attended_mean = n_prompt + (n_steps + 1) / 2 if n_steps else float(n_prompt)
        else:
            prompt_stats = session.stats()
            session.stats_reset()
            if llm._auditor is not None:
                llm._auditor.begin_answer()
            try:
                generate(llm, into, sampling)
            finally:
                weights = session.sources_end()
            passages = sources.find(weights, place.spans, place.files)
            stats = session.stats()
            stats = stats if stats.n_decode_tokens else prompt_stats
            attended_max, attended_mean = stats.attended_tokens_max, stats.attended_tokens_mean
            dense_max = stats.dense_tokens_max
            on_gpu = stats.gpu if stats.gpu.n_calls else None
        n_read, read_s = (reading.n_read, reading.seconds) if reading else (len(step.tokens), prompt_s)
        return Answer(
            question=text,
            text=into.text,
            sources=passages,
            usage=results.Usage(
                document_tokens=sum(len(span.ends) for span in place.spans),
                prompt_tokens=n_prompt,
                completion_tokens=into.n_tokens,
                attended_tokens=attended_max,
                attended_tokens_mean=attended_mean,
                dense_tokens=dense_max,
            ),
            timing=results.Timing(
                prefill_s=read_s,
                prefill_tokens_per_s=n_read / read_s if read_s else 0.0,
                decode_tokens_per_s=into.n_tokens / into.decode_s if into.decode_s else 0.0,
                first_token_s=(into.first_token_at or time.perf_counter()) - begin,
            ),
            memory=_memory(llm),
            finish_reason=into.finish_reason,
            context_full=into.context_full,
            audit=llm._auditor.report() if llm._auditor is not None else None,
            gpu=on_gpu,
        )

    def _feed_question(self, place: Place, text: str, *, sources: bool = True) -> Step:
        """Read the question, template included, up to where the answer begins; the session then watches sources."""
        llm = self.llm
        self._check_history(place)
        step = llm._encoder.extend(place.cursor, [*place.before, Part(text), *place.after], closed=True)
        n_prompt = step.keep + len(step.tokens)
        if n_prompt >= llm.n_ctx():
            raise ContextError(
                f"with the question there are {n_prompt} tokens, n_ctx is {llm.n_ctx()}",
                "make the Llama with a larger n_ctx, or start a new chat",
            )
        llm._rewind(step.keep)
        if llm.session is not None:
            llm.session.stats_reset()
        llm._feed_prompt(step.tokens, sources=sources)
        return step

    def _plan(
        self, place: Place, head: Sequence[Part], closing: tuple[Part, ...], done: Place, *, reserve: int | None
    ) -> Reading:
        """The plan of reading `head` and `closing` after `place`; ContextError when they do not fit."""
        llm = self.llm
        step = llm._encoder.extend(place.cursor, [*head, *closing], closed=False)
        free = min(_RESERVE, llm.n_ctx() // 8) if reserve is None else reserve
        if free < 0:
            raise ParameterError(f"reserve is at least 0 tokens, not {free}")
        n_needed = step.keep + len(step.tokens) + free
        if n_needed > llm.n_ctx():
            names = ", ".join(file.name for file in done.files[len(place.files) :])
            held = f" after the {step.keep} tokens already read" if step.keep else ""
            raise ContextError(
                f"{names} takes {len(step.tokens)} tokens{held}, with {free} kept for question and answer that is "
                f"{n_needed}; n_ctx is {llm.n_ctx()}",
                f"use n_ctx={-(-n_needed // 1024) * 1024} or more, or a shorter document",
            )
        spans = place.spans + tuple(span for span in step.spans if span.document != QUESTION)
        return Reading(place, closing, step, replace(done, cursor=step.cursor, spans=spans))


def _memory(llm: Llama) -> Memory:
    """Bytes of the tokens in the session, by the plan's share of each; nothing is known of llama.cpp's."""
    if llm.session is None:
        return Memory(kv_bytes=0, summary_bytes=0)
    plan, params = llm.session.plan, llm.session.params
    n_chunks = max(params.n_ctx // params.n_chunk_tokens, 1)
    return Memory(
        kv_bytes=plan.kv_bytes * llm.session.n_past // params.n_ctx,
        summary_bytes=plan.summary_bytes * min(llm.session.n_chunks, n_chunks) // n_chunks,
    )


def texts(files: Sequence[TextFile], before: Sequence[TextFile] = ()) -> list[Part]:
    """Documents numbered from those `before` on, each after its name, a blank line between them."""
    parts: list[Part] = []
    for i, (heading, file) in enumerate(zip(headings(files, before=before), files, strict=True)):
        parts.append(Part((GAP if i else "") + heading))
        parts.append(Part(file.text, document=len(before) + i))
    return parts


def template(text: str) -> tuple[Part, ...]:
    return (Part(text, template=True),)


@dataclass(frozen=True)
class Beginning:
    """A first turn: parts up to the end of system text and documents, what follows them, and the place then."""

    head: tuple[Part, ...]
    closing: tuple[Part, ...]
    done: Place


def beginning(llm: Llama, content: Sequence[Part], files: Sequence[TextFile]) -> Beginning:
    """A first turn with `content` in the system role; where the template has none, before the question."""
    head, middle, tail = llm._template.first(system=bool(content))
    closing = template(middle) if middle is not None else (Part(GAP),) if content else ()
    done = Place(Cursor(), (), template(tail), tuple(files))
    return Beginning((*template(head), *content), closing, done)


class Document(Conversation):
    """One reading of one or more documents; the basis of any number of questions. Made by `Llama.read` and `open`.

    Attributes:
        llm: the Llama whose session holds it.
        names: of the documents; `name` is the first.
        files: the documents themselves (`name`, `text`).
        tokens_total: tokens of the reading, template included. `tokens_read` is less after an interrupted reading:
            questions then see what was read, and `resume` reads on.

    Example:
        >>> doc = llm.read("book.txt")
        >>> for question in ("Who kept the key?", "Where?"):
        ...     print(doc.ask(question))
    """

    def __init__(
        self,
        llm: Llama,
        files: Sequence[TextFile],
        *,
        system: str | None = None,
        question: str | None = None,
        reserve: int | None = None,
    ) -> None:
        super().__init__(llm)
        content = [Part(system), Part(GAP)] if system else []
        content += [Part(question, document=QUESTION), Part(GAP)] if question else []
        begin = beginning(llm, [*content, *texts(files)], files)
        without = beginning(llm, content, [])
        nothing = replace(without.done, before=without.head + without.closing)
        self._reading = self._plan(nothing, begin.head, begin.closing, begin.done, reserve=reserve)

    def _here(self) -> Place:
        return self._reading.here()

    @property
    def files(self) -> tuple[TextFile, ...]:
        """The documents themselves, also of a reading that was interrupted."""
        return self._reading.done.files

    @property
    def name(self) -> str:
        return self.files[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files)

    @property
    def text(self) -> str:
        """The text of the first document."""
        return self.files[0].text

    def tokens_at(self, start: int, end: int, document: int = 0) -> tuple[int, int]:
        """Positions [first, last) in the session of the tokens that hold characters [start, end) of a document.

        Example:
            >>> trace.needle_recall(*doc.tokens_at(at, at + len(fact)))
        """
        first, ends = self.token_ends(document)
        begin = int(np.searchsorted(ends, start, side="right"))
        return first + begin, first + min(int(np.searchsorted(ends, end, side="left")) + 1, len(ends))

    @property
    def tokens_total(self) -> int:
        return self._reading.n_total

    @property
    def tokens_read(self) -> int:
        """Tokens of the reading that are in the session."""
        return self._reading.n_read

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._reading.seconds

    def resume(self, *, progress: Progress | None = None) -> None:
        """Read on after an interrupted reading, into the Llama's KV file where it was being written; nothing to do when
        all was read.

        Args:
            progress: as in `Llama.read`; counts from what was read before.

        Raises:
            StateError: the session was used for something else meanwhile.
            Cancelled, KeyboardInterrupt: as `Llama.read`.
        """
        if self.tokens_read > 0:
            self._check_history(self._reading.here())
        if self.tokens_read < self.tokens_total:
            with saved.written(self.llm, self._reading):
                self._read(self._reading, progress)

    def save(self, path: PathLike) -> None:
        """Write the reading to a KV file, in place of what is there: `Llama.open` opens it without reading again.

        An interrupted reading is written as far as it went. Questions and answers are not part of it.

        Raises:
            KVFileError: the file cannot be written: the folder is missing or read-only, the disk is full.
            StateError: the session was used for something else since the reading.
            ParameterError: llama.cpp runs the model.

        Example:
            >>> llm.read("book.txt").save("book.akv")
        """
        if self.tokens_read > 0:
            self._check_history(self._reading.here())
        self.llm._native_session("a KV file")
        self.llm._rewind(self.tokens_read)
        saved.save(self.llm, path, self.files, self._reading)

    @classmethod
    def _opened(cls, llm: Llama, path: PathLike) -> Document:
        """The document of a KV file, whose session takes the place of the Llama's."""
        document = cls.__new__(cls)
        Conversation.__init__(document, llm)
        document._reading = saved.open_reading(llm, path)
        return document

    def ask(
        self,
        question: str,
        *,
        retrieval: Retrieval | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """Answer one question from the documents alone; earlier questions are not seen.

        Args:
            question: text; never becomes control tokens.
            max_tokens: of the answer, at least 1, by default 1024; None: no limit. It ends earlier, with
                `context_full`, where n_ctx is full.
            min_tokens: of the answer, at most max_tokens, by default 0: it does not end before, save by `stop` or a
                full n_ctx.
            temperature: 0.0 (default) takes the likeliest token.
            top_p, min_p, top_k: as in llama_cpp (0.95, 0.05, 40), where temperature is above 0.
            seed: of the sampling, 0 to 4294967295; -1: a new one each time; None: the Llama's own.
            stop: a text, or several, that end the answer; not part of it. None, as by default: none.
            on_text: called with pieces of the answer as they come; returning False ends it ("cancelled").
            retrieval: answers by another method or budget, as `Llama.answering` has it.

        Raises:
            ContextError: the question does not fit n_ctx beside the documents.
            StateError: the session was used for something else since the reading; of one that was stopped, not a word
                of the documents is there yet.
            ParameterError: an unknown argument; with `retrieval` the reading would have been another one.

        Example:
            >>> doc.ask("Who kept the key?", on_text=print).sources[0].text
        """
        how, place = Sampling.of(**sampling), self._here()
        if not place.spans:
            raise StateError(
                f"nothing of {', '.join(self.names)} was read: {self.tokens_read} of {self.tokens_total} tokens",
                "resume() reads on",
            )
        return self._answer(place, question, how, Generated(), reading=self._reading, retrieval=retrieval)


def text_files(source: Source, text: str | None, name: str | None, *, kv_files: bool = False) -> list[TextFile]:
    """What `read` was given, in memory. DocumentError where there is nothing in it.

    Args:
        kv_files: of a KV file the documents are taken, else it is refused.
    """
    if (source is None) == (text is None):
        raise ParameterError("give either a source or text=")
    if text is not None:
        if not isinstance(text, str):
            raise ParameterError(f"text is a str, not {type(text).__name__}", "decode bytes first")
        source = TextFile(name or "text", text)
    single = isinstance(source, (str, bytes)) or not isinstance(source, Iterable)
    sources: list[object] = [source] if single else list(cast("Iterable[object]", source))
    if not sources:
        raise DocumentError("no documents were given")
    files: list[TextFile] = []
    for item in sources:
        if not isinstance(item, (str, Path, TextFile)):
            raise ParameterError(f"a source is a path or a TextFile, not {type(item).__name__}", "give text= a text")
        if isinstance(item, TextFile):
            check_words(item.name, item.text)
            files.append(item)
        elif kv_files and is_kv_file(item):
            files += saved.texts(item)
        else:
            files.append(load(item))
    return files
