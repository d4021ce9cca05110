"""Breaks when a chat loses what was read or said, or cannot go on: its commands over a tiny model, in this process."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actqkv_cpp import Llama, Retrieval
from actqkv_cpp.cli import _saved
from actqkv_cpp.cli._options import SamplingOptions
from actqkv_cpp.cli._output import Output, Update
from actqkv_cpp.cli._repl import Repl
from actqkv_cpp.cli._session import find_documents, load_document, progress_of, start
from actqkv_cpp.reader import TextFile

SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=128)
SAMPLING = SamplingOptions(temperature=0.0, top_p=0.95, min_p=0.05, max_tokens=3, seed=None)
TEXT = "A weaver described the second vase near the shore. They slowly counted the golden rug by the fence. "


class _Output(Output):
    """Presses Ctrl-C, once, after `stop` tokens of a reading; breaks the next answer off, as a second one does."""

    stop: int | None = None
    breaks = False

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        def show(piece: str) -> None:
            if self.breaks:
                self.breaks = False
                raise KeyboardInterrupt

        yield show

    @contextmanager
    def progress(self, what: str, unit: str = "tokens", *, rate_span_s: float = 0.0) -> Iterator[Update]:
        def update(done: int, total: int, what: str | None = None) -> None:
            if self.stop is not None and done >= self.stop:
                self.stop = None
                signal.raise_signal(signal.SIGINT)

        yield update


class Talk:
    """A chat as `actqkv chat` holds it, and files `small` and `long` for it."""

    def __init__(self, llm: Llama, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.llm, self._capsys, self._output = llm, capsys, _Output()
        self._lines: list[str] = []
        self.small, self.long = folder / "small.txt", folder / "long.txt"
        self.small.write_text(TEXT, encoding="utf-8")
        self.long.write_text(TEXT * 4, encoding="utf-8")

    def begin(self, *documents: Path, stop: int | None = None) -> str:
        """Read the documents of -d, with Ctrl-C after `stop` tokens; what is said of that."""
        names = [str(document) for document in documents]
        found = find_documents(names)
        self._output.stop, self.llm.document = stop, None
        if found.opened is not None:
            self.llm.open(found.opened)
        chat = start(self._output, self.llm, found, system=None, reserve=0)
        self._repl = Repl(self._output, self, chat, sampling=SAMPLING, documents=names)
        return self._capsys.readouterr().err

    def take_up(self, name: str, files: dict[str, TextFile], *, stop: int | None = None) -> None:
        """Go on with a saved chat whose documents of -d were read, with Ctrl-C after `stop` tokens of a reading."""
        self._output.stop = stop
        self._repl.take_up(_saved.load(name), files)

    def next(self) -> str:
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)

    def __call__(self, *lines: str, stop: int | None = None, breaks: bool = False) -> str:
        """What standard error says to lines, with Ctrl-C after `stop` tokens of a reading, or twice in an answer."""
        self._output.stop, self._output.breaks, self._lines = stop, breaks, list(lines)
        self._repl.run()
        return self._capsys.readouterr().err


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[Llama]:
    with Llama(tiny_model, n_ctx=1024, n_threads=1, retrieval=SMALL, verbose=False) as llm:
        yield llm


@pytest.fixture
def talk(
    llm: Llama, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Talk]:
    monkeypatch.setenv("ACTQKV_DATA_DIR", str(tmp_path / "data"))
    return Talk(llm, capsys, tmp_path)


def test_read_on_after_a_stopped_read(talk: Talk) -> None:
    """What Ctrl-C stopped of /read FILE cannot be read on, or blocks /save when it is read whole."""
    talk.begin(talk.small)
    seen = talk(f"/read {talk.long}", "Who?", "/save one", stop=64)
    assert "stopped: read the first 64 of" in seen
    assert "/read reads on" in seen
    assert f"known of {talk.long}: the first " in seen
    assert f"error: {talk.long} is not read whole" in seen
    seen = talk("/read", "Where?", "/stats", "/save one", "/read")
    assert "without the rest is forgotten; no turns yet" in seen
    assert "known of" not in seen
    assert seen.count(f"tokens of {talk.long} in") == 2
    assert "saved; actqkv chat --resume one goes on" in seen
    assert seen.count("error:") == 1
    assert "/read needs a file: no reading was stopped" in seen


def test_how_far_a_reading_went() -> None:
    """A rate is told where none is known, or of tokens that were read before."""
    assert progress_of("a, b", 5000, 5000, 0.0) == "read 5,000 tokens of a, b"
    assert progress_of("a", 700, 900, 2.0, already=500) == "read the first 700 of 900 tokens of a in 0:02 (100/s)"
    assert progress_of("a", 5, 0, 2.0) == "nothing is left to read of a"


def test_going_back_before_a_stopped_read(talk: Talk) -> None:
    """A document is told as known, or blocks /save, after /undo or /reset dropped it, or on a branch without it."""
    talk.begin(talk.small)
    for back in ("/undo", "/reset", "/branch 0"):
        assert "known of" in talk("Who?", f"/read {talk.long}", "Where?", stop=64)
        seen = talk(*([back] * 2 if back == "/undo" else [back]), "Who?", "/stats", f"/save talk{back[1:4]}")
        assert (f"no longer read, as it came after that: {talk.long}" in seen) == (back != "/branch 0")
        assert "known of" not in seen
        assert f"tokens of {talk.long} in" not in seen
        assert "goes on" in seen.splitlines()[-1]


def test_read_on_behind_a_kv_file(talk: Talk) -> None:
    """Documents behind a KV file cannot be read on after Ctrl-C, or those behind the first are dropped in silence."""
    opened = talk.small.with_suffix(".akv")
    talk.llm.read(talk.small).save(opened)
    last = talk.small.rename(talk.small.with_name("last.txt"))
    assert "stopped: read the first 64 of" in talk.begin(opened, talk.long, last, stop=64)
    seen = talk("/read", "Who?", "/save behind")
    assert f"tokens of {talk.long}, {last} in" in seen
    assert "known of" not in seen
    assert "saved; actqkv chat --resume behind goes on" in seen


def test_documents_not_begun(talk: Talk) -> None:
    """Of a KV file of half a document and another document, that is dropped in silence when Ctrl-C stops the rest."""
    half = talk.long.with_suffix(".akv")
    with pytest.raises(KeyboardInterrupt):
        talk.llm.read(talk.long, progress=lambda done, total: signal.raise_signal(signal.SIGINT))
    assert talk.llm.document is not None
    talk.llm.document.save(half)
    seen = talk.begin(half, talk.small, stop=128)
    assert f"not begun: {talk.small}; /read FILE reads it" in seen
    seen = talk("/read", f"/read {talk.small}", "Who?", "/save half")
    assert "known of" not in seen
    assert "error:" not in seen


def test_read_on_names_what_it_drops(talk: Talk) -> None:
    """A document that was read after a stopped one is dropped without a word when that is read on."""
    talk.begin(talk.long, stop=64)
    seen = talk(f"/read {talk.small}", "/read")
    assert f"no longer read, as it came after that: {talk.small}; /read FILE reads a document again" in seen
    assert "error:" not in seen
    assert f"{talk.long}" in talk("/stats")


def test_taken_up_as_it_was(talk: Talk) -> None:
    """A saved chat is taken up with other tokens than it had, or behind a part of a document."""
    both = talk.small.with_suffix(".akv")
    talk.llm.read([talk.small, talk.long]).save(both)
    talk.begin(talk.small)
    talk("Who?", f"/read {both}", "Where?", "/save one")
    tokens = talk.llm.eval_tokens.copy()
    files = {file.sha256: file for file in load_document(str(both))}
    talk.begin(talk.small)
    talk.take_up("one", files)
    assert talk.llm.eval_tokens == tokens
    talk.begin(talk.small)
    with pytest.raises(KeyboardInterrupt):
        talk.take_up("one", files, stop=64)


def test_branch_with_a_document_of_its_own(talk: Talk) -> None:
    """A branch that read a document ends with an error that no command can heal, or reads it again without a word."""
    talk.begin(talk.small)
    talk("Who?", "/branch 1", f"/read {talk.long}", "Where?", "/switch 1", "Where?", "/switch 2")
    again = f"read again, as another branch took its place: {talk.long}"
    for line in ("Who?", "/ask Who?", f"/read {talk.small}"):
        seen = talk(line, stop=64)
        assert again in seen
        assert seen.endswith("stopped\n")
    seen = talk("Who?", "Where?", "/branch")
    assert seen.count(again) == 1
    assert "error:" not in seen
    assert "branch 2 (here): 4 turns" in seen


def test_edit_loses_nothing(talk: Talk) -> None:
    """/edit with a question that cannot be asked loses the old turn, or a document that was read after it."""
    talk.begin(talk.small)
    assert "error: there is no turn to edit" in talk("/edit Who?")
    talk("Who?", "Where?")
    tokens = talk.llm.eval_tokens.copy()
    seen = talk(f"/edit {'who ' * 2000}", f"/save {talk.small}.json", "/branch")
    assert "error: with the question there are" in seen
    assert "saved 2 answers" in seen
    assert seen.endswith("2  Where?\n")
    talk("/edit When?")
    assert talk.llm.eval_tokens != tokens
    talk("/edit Where?")
    assert talk.llm.eval_tokens == tokens
    seen = talk(f"/read {talk.long}", "/edit When?", "/save one")
    assert f"/edit would drop what was read after the last question: {talk.long}" in seen
    assert [event.question for event in _saved.load("one").turns] == ["Who?", "Where?"]
    assert f"no longer read, as it came after that: {talk.long}" in talk("/undo")


def test_save_spares_another_chat(talk: Talk) -> None:
    """/save NAME replaces another chat of that name, or not its own."""
    talk.begin(talk.small)
    talk("Who?", "/save one")
    talk.begin(talk.small)
    assert "error: there is a chat one already" in talk("Where?", "/save one")
    assert [turn.question for turn in _saved.load("one").turns] == ["Who?"]
    talk.begin(talk.small)
    talk.take_up("one", {})
    assert talk("When?", "/save one", "/save two", "Where?", "/save two").count("saved; ") == 3
    assert [len(_saved.load(name).turns) for name in ("one", "two")] == [2, 3]


def test_taken_up_from_another_folder(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one name cannot be told apart, or a saved chat reads another prompt than was saved."""
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(f"{folder}: {TEXT}", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "a")
    talk.begin(Path("notes.txt"), Path("../b/notes.txt"))
    talk("Who?", "/read ../c/notes.txt", "Where?", "/save notes")
    tokens = list(talk.llm.eval_tokens)
    told = talk.llm.detokenize(tokens).decode(errors="replace").replace(" ", "")
    assert [told.count(f"Document:{folder}/notes.txt") for folder in ("a", "b", "c")] == [1, 1, 1]
    monkeypatch.chdir("/")
    saved = _saved.load("notes")
    talk.begin(*map(Path, saved.documents))
    later = load_document(str(tmp_path / "c" / "notes.txt"))
    talk.take_up("notes", {file.sha256: file for file in later})
    assert list(talk.llm.eval_tokens) == tokens


def test_paths_as_terminals_paste_them(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/read refuses a path with quotes or backslashes, or a file whose name really has them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("my notes.txt", "it's.txt", '"a".txt'):
        (tmp_path / name).write_text("the key", encoding="utf-8")
    paths = ("my notes.txt", '"my notes.txt"', "'my notes.txt'", "~/my\\ notes.txt", "it's.txt", '"a".txt')
    talk.begin()
    seen = talk(*(f"/read {path}" for path in paths))
    assert seen.count("tokens of ") == len(paths)
    assert "error:" not in seen
    assert "error: no such file: none" in talk("/read 'none'")
    assert "error: no such file: it's" in talk("/read it's")


def test_an_answer_broken_off(talk: Talk) -> None:
    """What a second Ctrl-C broke off is part of the conversation, and yet the answer before it counts as the last."""
    talk.begin(talk.small)
    assert "passages" not in talk("Who?", "/sources")
    transcript = talk.small.with_suffix(".json")
    seen = talk("Where?", "/sources", "/stats", f"/save {transcript}", "/save one", breaks=True)
    assert "stopped\nno passages are known of the last answer" in seen
    assert "last answer:" not in seen
    assert "saved 2 answers" in seen
    turns = json.loads(transcript.read_text(encoding="utf-8"))["turns"]
    assert [turn["question"] for turn in turns] == ["Who?", "Where?"]
    assert turns[1]["answer"]
    talk.begin(talk.small)
    talk.take_up("one", {})
    assert "no passages are known" in talk("/sources")
    assert "saved 3 answers" in talk("When?", f"/save {transcript}2")
