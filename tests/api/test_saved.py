"""Breaks when a document that was saved, or written while it was read, opens as something else than it was."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import make_tiny_gguf, quantize_gguf

from actqkv_cpp import (
    Cancelled,
    ContextError,
    Document,
    DocumentError,
    KVFileError,
    Llama,
    MemoryPlanError,
    ParameterError,
    Retrieval,
    StateError,
    identity,
    kvfile,
    machine,
    saved,
)
from actqkv_cpp.reader import TextFile

SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=128)
TEXT = "The weaver counted Grüße an Łódź by the fence. " * 30 + "Then <|end|> came.\n"
OTHER = "A second vase near the shore. " * 9


def make(model: Path, **options: Any) -> Llama:
    return Llama(model, **{"n_ctx": 4096, "n_threads": 1, "retrieval": SMALL, "verbose": False} | options)


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Llama]:
    with make(tiny_model) as found:
        yield found


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def asked(doc: Document, question: str = "Who?") -> tuple[Any, ...]:
    """An answer, without what the clock has to do with."""
    answer = doc.ask(question, max_tokens=12, min_tokens=12)
    return answer.text, answer.sources, answer.usage, answer.finish_reason


def plans(llm: Llama, doc: Document) -> list[tuple[Any, ...]]:
    with llm.record() as trace:
        asked(doc)
    return [
        (r.n_past, r.layer, r.n_chunks, None if r.chosen is None else r.chosen.tolist(), repr(r.entropy))
        for r in trace.records
    ]


def test_saved_and_opened(llm: Llama, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when answers, passages or plans from a file differ from those of the reading, or offsets do."""
    doc = llm.read([book], system="Be brief.")
    doc.save(tmp_path / "a.akv")
    expected, recorded = [asked(doc, q) for q in ("Who?", "And where?")], plans(llm, doc)
    ends = doc.token_ends()
    with make(tiny_model, n_ctx=8192) as other:
        found = other.open(tmp_path / "a.akv")
        assert (found.names, found.text, found.tokens_read) == (doc.names, TEXT, doc.tokens_total)
        assert [asked(found, q) for q in ("Who?", "And where?")] == expected
        assert plans(other, found) == recorded
        assert found.token_ends()[0] == ends[0]
        np.testing.assert_array_equal(found.token_ends()[1], ends[1])
        for source in found.ask("Who?", max_tokens=3).sources:
            assert TEXT[source.start : source.end] == source.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.akv", "book.txt"]


def test_several_documents_and_a_question(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when documents, their names and places, or the question before them are lost."""
    other = tmp_path / "b.md"
    other.write_text("# One\n\n" + OTHER + "\n\n# Two\n\n" + OTHER)
    doc = llm.read([book, other], question="What was counted?")
    doc.save(tmp_path / "a.akv")
    expected = asked(doc)
    found = llm.open(tmp_path / "a.akv")
    assert found.files == doc.files
    assert asked(found) == expected


def test_chat_over_an_opened_document(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when a conversation over a file goes another way, or cannot take one more document."""
    answers = []
    llm.read(book).save(tmp_path / "a.akv")
    for doc in (llm.read(book), llm.open(tmp_path / "a.akv")):
        chat = llm.chat(doc)
        first = chat.say("Who?", max_tokens=6, min_tokens=6).text
        chat.read(text=OTHER, name="more")
        answers.append((first, chat.say("Where?", max_tokens=6, min_tokens=6).text, chat.documents))
    assert answers[0] == answers[1]


def test_save_after_questions(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when questions asked before saving get into the file, or saving ends the conversation."""
    doc = llm.read(book)
    expected = asked(doc)
    doc.save(tmp_path / "a.akv")
    doc.save(tmp_path / "a.akv")  # in place of the first
    assert asked(doc) == expected
    assert kvfile.info(tmp_path / "a.akv").n_tokens == doc.tokens_total
    assert asked(llm.open(tmp_path / "a.akv")) == expected
    llm.open(tmp_path / "a.akv").save(tmp_path / "b.akv")
    assert asked(llm.open(tmp_path / "b.akv")) == expected
    llm.read(text="Another text altogether.")
    with pytest.raises(StateError, match="used for something else"):
        doc.save(tmp_path / "c.akv")


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_written_while_read(kv_type: str, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when reading into a file, stopping and going on gives another document than reading in memory."""
    path = tmp_path / "a.akv"
    with make(tiny_model, kv_type=kv_type) as llm:
        expected = asked(llm.read(book))
    with make(tiny_model, kv_type=kv_type, kv_file=path) as llm:
        with pytest.raises(Cancelled):
            llm.read(book, progress=lambda done, _: done < 300)
        assert kvfile.info(path).n_done >= 300
        assert not kvfile.info(path).complete
    with make(tiny_model, kv_type=kv_type, kv_file=path) as llm:
        seen: list[int] = []
        doc = llm.read(book, progress=lambda done, _: seen.append(done))
        assert min(seen) > 300
        assert asked(doc) == expected
    with make(tiny_model, kv_type=kv_type, kv_file=path) as llm:
        before = path.read_bytes()
        assert asked(llm.read(book, progress=lambda *_: pytest.fail("read again"))) == expected
        assert path.read_bytes() == before
    kvfile.verify(path)


@pytest.mark.parametrize("how", ["document", "chat"])
def test_reading_on_goes_on_writing(how: str, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when the file of a reading that was stopped and read on, by the same Llama, never becomes whole."""
    path = tmp_path / "a.akv"
    with make(tiny_model) as llm:
        expected = asked(llm.read(book))
    with make(tiny_model, kv_file=path) as llm:
        with pytest.raises(Cancelled):
            llm.read(book, progress=lambda done, _: done < 300)
        doc = llm.document
        assert doc is not None
        doc.ask("Who?", max_tokens=3)
        if how == "document":
            doc.resume()
            assert asked(doc) == expected
        else:
            chat = llm.chat(doc)
            chat.say("Who?", max_tokens=3)
            chat.resume()
    assert kvfile.info(path).complete
    kvfile.verify(path)
    with make(tiny_model) as llm:
        assert asked(llm.open(path)) == expected


def test_opened_before_it_is_complete(llm: Llama, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when an interrupted reading opens as a whole one, or cannot be read on."""
    expected = asked(llm.read(book))
    with pytest.raises(Cancelled):
        llm.read(book, progress=lambda done, _: done < 300)
    assert llm.document is not None
    llm.document.save(tmp_path / "a.akv")
    doc = llm.open(tmp_path / "a.akv")
    assert 300 <= doc.tokens_read < doc.tokens_total
    doc.resume()
    assert asked(doc) == expected
    assert not kvfile.info(tmp_path / "a.akv").complete


def test_another_text_or_another_way(tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when a file is gone on with by a reading that is not the one it was begun for."""
    path = tmp_path / "a.akv"
    with make(tiny_model, kv_file=path) as llm:
        llm.read(book)
        before = path.read_bytes()
        digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (TEXT, TEXT + "More.")]
        book.write_text(TEXT + "More.", encoding="utf-8")
        with (
            pytest.warns(UserWarning, match="has changed"),
            pytest.raises(StateError, match=rf"{digests[0]} .*{digests[1]} "),
        ):
            llm.read(book)
        with (
            pytest.warns(UserWarning, match="has changed"),
            pytest.raises(StateError, match="other documents, system text"),
        ):
            llm.read(text=TEXT, system="Be brief.")
    book.write_text(TEXT, encoding="utf-8")
    wider = dataclasses.replace(SMALL, budget=160, summary="mean")
    said = "budget is 160, in the file 128, summary is mean, in the file spread"
    with make(tiny_model, kv_file=path, retrieval=wider) as llm, pytest.raises(StateError, match=said):
        llm.read(book)
    assert path.read_bytes() == before


def test_answered_by_what_is_given(llm: Llama, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when the method of a reading is not the default for its file, or a given one is ignored."""
    llm.read(book).save(tmp_path / "a.akv")
    with make(tiny_model, retrieval=None) as other:
        other.open(tmp_path / "a.akv")
        assert other.session is not None
        assert (other.session.params.n_local, other.session.answering.budget, other.retrieval.budget) == (64, 128, 128)
        other.read(text="Short.")  # by its own again
        assert (other.session.params.n_local, other.retrieval) == (512, Retrieval())
    with make(tiny_model, retrieval=dataclasses.replace(SMALL, budget=160)) as other:
        doc = other.open(tmp_path / "a.akv")
        assert other.session is not None
        assert other.session.answering.budget == 160
        other.audit(2)
        assert doc.ask("Who?", max_tokens=8, min_tokens=8).audit is not None
        assert other.open(tmp_path / "a.akv").ask("Who?", max_tokens=8, min_tokens=8).audit is not None
    for retrieval, what in ((Retrieval("quest-clamped", n_local=64, window=32, n_sink=4, budget=128), "granularity is"),
                            (dataclasses.replace(SMALL, n_local=96, budget=160), "n_local is 96")):  # fmt: skip
        with make(tiny_model, retrieval=retrieval) as other:
            with pytest.raises(ParameterError, match=what):
                other.open(tmp_path / "a.akv")
            other.read(text="Still usable.")


def test_clamped_stays_clamped(tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when a method with positions "auto" refuses a file because n_ctx resolves them otherwise."""
    with make(tiny_model, n_ctx=8192) as llm:
        assert llm.session is not None
        assert llm.n_ctx_train < 8192
        llm.read(book).save(tmp_path / "a.akv")
    with make(tiny_model, n_ctx=1984) as llm:
        assert llm.session is not None
        assert llm.session.params.columns["positions"] == "exact"
        llm.open(tmp_path / "a.akv")
        assert llm.session.params.columns["positions"] == "clamped"


def test_errors_of_opening(llm: Llama, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when a file that cannot be opened costs the Llama its session, or is told without what to do."""
    llm.read(book).save(tmp_path / "a.akv")
    doc = llm.read(book)
    expected = asked(doc)
    (tmp_path / "b.akv").write_text("text " * 1000)
    with pytest.raises(KVFileError, match=r"none\.akv"):
        llm.open(tmp_path / "none.akv")
    with pytest.raises(StateError, match=r"b\.akv is not a KV file"):
        llm.open(tmp_path / "b.akv")
    with pytest.raises(DocumentError, match="is a KV file of actqkv"):
        llm.read(tmp_path / "a.akv")
    assert asked(doc) == expected
    with make(tiny_model, n_ctx=300) as small, pytest.raises(ContextError, match="n_ctx is 300"):
        small.open(tmp_path / "a.akv")
    with make(tiny_model, retrieval=Retrieval("llama.cpp")) as dense:
        with pytest.raises(ParameterError, match=r"llama\.cpp"):
            dense.open(tmp_path / "a.akv")
        with pytest.raises(ParameterError, match=r"llama\.cpp"):
            dense.read(text="Short.").save(tmp_path / "c.akv")


def test_errors_of_saving(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when a path that cannot be written is told by another name, or leaves something behind."""
    doc = llm.read(book)
    (tmp_path / "folder.akv").mkdir()
    for name, reason in (("none/a.akv", "No such file"), ("folder.akv", "Is a directory")):
        with pytest.raises(KVFileError, match=reason) as caught:
            doc.save(tmp_path / name)
        assert name in str(caught.value)
        assert ".tmp" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "folder.akv"]
    doc.save(tmp_path / "a.akv")


def test_a_disk_without_room(llm: Llama, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a reading begins to fill a disk that cannot hold it."""
    doc = llm.read(book)
    assert llm.session is not None
    needed = (llm.session.plan.kv_bytes + llm.session.plan.summary_bytes) * doc.tokens_total // llm.n_ctx()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(KVFileError, match=f"takes {needed:,} bytes, {needed - 1:,} are free"):
        doc.save(tmp_path / "a.akv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt"]


def test_another_model(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when a file is answered from by a model that did not read it."""
    llm.read(book).save(tmp_path / "a.akv")
    seed = make_tiny_gguf(tmp_path / "seed.gguf", seed=1)
    with make(seed) as other, pytest.raises(StateError, match=r"read by another model: .*this is"):
        other.open(tmp_path / "a.akv")


def test_another_quantisation(tmp_path: Path, book: Path) -> None:
    """Breaks when another quantisation of the model is refused, or taken without a word."""
    one = make_tiny_gguf(tmp_path / "f16.gguf", n_embd=256, n_ff=256, quantisation="F16")
    two = quantize_gguf(one, tmp_path / "q8.gguf", "Q8_0")
    ids = [identity.of_model(path) for path in (one, two)]
    assert ids[0].exact != ids[1].exact
    assert (ids[0].family, ids[0].tokenizer) == (ids[1].family, ids[1].tokenizer)
    with make(one) as llm:
        llm.read(book).save(tmp_path / "a.akv")
    with make(two) as llm, pytest.warns(UserWarning, match="another quantisation"):
        assert asked(llm.open(tmp_path / "a.akv"))


def test_a_document_that_changed(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when an edited document is answered from as it was, without a word."""
    llm.read(book).save(tmp_path / "a.akv")
    os.utime(book, (0, 0))  # touched, not changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.open(tmp_path / "a.akv")
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (TEXT, "New.")]
    book.write_text("New.")
    with pytest.warns(UserWarning, match=f"sha256 {digests[0]} then, {digests[1]} now"):
        assert llm.open(tmp_path / "a.akv").text == TEXT
    book.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.open(tmp_path / "a.akv")


def test_a_document_that_changed_before_it_was_saved(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when a document that was edited between reading and saving, or before it is saved once more, is taken for
    what the file holds; or a text for the file of its name."""
    document = llm.read(book)
    book.write_text("New.")
    document.save(tmp_path / "a.akv")
    for name, then in (("a.akv", "b.akv"), ("b.akv", "c.akv")):
        with pytest.warns(UserWarning, match="has changed"):
            llm.open(tmp_path / name).save(tmp_path / then)
    llm.read(text=TEXT, name=str(book)).save(tmp_path / "text.akv")
    book.write_text("Newer.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.open(tmp_path / "text.akv")


def test_memory_is_planned(tiny_model: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a file is planned as memory, or what is needed beside it is not planned at all."""
    with make(tiny_model, n_ctx="64k") as llm:
        assert llm.session is not None
        plan = llm.session.plan
        llm.read(book).save(tmp_path / "a.akv")
    assert plan.needed_bytes(1 << 16, n_in_file=1 << 16) < plan.total_bytes - plan.kv_bytes // 2
    assert plan.needed_bytes(1 << 16, n_in_file=kvfile.info(tmp_path / "a.akv").n_tokens) == plan.total_bytes
    monkeypatch.setattr(machine, "available_memory", lambda: plan.total_bytes - plan.kv_bytes // 2)
    with pytest.raises(MemoryPlanError, match="65536 tokens") as caught:
        make(tiny_model, n_ctx="64k")
    assert "kv_file" in str(caught.value.hint)
    roomy = make(tiny_model, n_ctx="64k", kv_file=tmp_path / "a.akv")
    with roomy, pytest.raises(MemoryPlanError, match="in a file"):  # what comes after the document would be in memory
        roomy.open(tmp_path / "a.akv")
    with make(tiny_model) as llm:
        llm.open(tmp_path / "a.akv")
        monkeypatch.setattr(machine, "available_memory", lambda: 1 << 16)
        with pytest.raises(MemoryPlanError, match="in a file"):
            llm.open(tmp_path / "a.akv")


def test_kv_file_in_a_running_chat(llm: Llama, tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when a KV file that is added to a chat is not the document that was read into it."""
    llm.read(book).save(tmp_path / "a.akv")
    told = []
    for source in (book, tmp_path / "a.akv"):
        chat = llm.chat(TextFile("other.txt", OTHER))
        chat.say("Who?", max_tokens=4)
        chat.read(source)
        told.append((chat.documents, chat.say("And where?", max_tokens=8, min_tokens=8).text, chat.token_ends(1)[0]))
    assert told[0] == told[1]
    assert told[0][0] == ["other.txt", str(book)]
    with pytest.raises(KVFileError, match=r"none\.akv"):
        llm.chat().read(tmp_path / "none.akv")


def test_first_document_of_a_chat(tiny_model: Path, book: Path, tmp_path: Path) -> None:
    """Breaks when the document that a chat begins with is not in the KV file, another is, or what the session held
    before is."""
    path = tmp_path / "a.akv"
    with make(tiny_model) as llm:
        chat = llm.chat()
        chat.read(book)
        expected = chat.say("Who?", max_tokens=8, min_tokens=8).text
    with make(tiny_model, kv_file=path) as llm:
        llm.create_completion("who kept the book", max_tokens=2)
        chat = llm.chat()
        chat.read(book)
        info = kvfile.info(path)
        assert info.complete
        assert info.n_tokens == chat.readings[0].n_total
        before = path.read_bytes()
        assert chat.say("Who?", max_tokens=8, min_tokens=8).text == expected
        chat.read(TextFile("other.txt", OTHER))
        assert chat.documents == [str(book), "other.txt"]
        assert path.read_bytes() == before
    with make(tiny_model) as llm:
        chat = llm.chat(llm.open(path))
        assert chat.documents == [str(book)]
        assert chat.say("Who?", max_tokens=8, min_tokens=8).text == expected


def test_nothing_leaks(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when opening and closing over and over keeps memory, mappings, files or sessions."""
    llm.read(book).save(tmp_path / "a.akv")

    def held() -> tuple[int, int, int]:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("RssAnon:")[1].split()[0])
        return resident, len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("a.akv")

    for _ in range(30):
        llm.open(tmp_path / "a.akv")
    before = held()
    for _ in range(1000):
        llm.open(tmp_path / "a.akv")
    after = held()
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 4096  # KiB; a session of this model has 1000


# the section, by itself


def sections(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The section's JSON with each of its values, wherever it stands, replaced by others."""
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        paths.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, (*path, key))

    walk(found, ())
    for path in paths[1:]:
        for value in (None, -1, 10**9, "x", [], {}, [[1, 2, 3]], True, 1.5):
            changed = json.loads(json.dumps(found))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield changed


def test_a_section_that_is_none(llm: Llama, book: Path, tmp_path: Path) -> None:
    """Breaks when a forged section ends in anything but a StateError, or in a document that cannot be asked."""
    doc = llm.read([book], question="Who?")
    doc.save(tmp_path / "a.akv")
    tokens, _, section = kvfile.read(tmp_path / "a.akv")
    (n,) = struct.unpack_from("<Q", section)
    found, ends = json.loads(section[8 : 8 + n]), section[8 + n :]
    n_refused = n_taken = 0
    for changed in sections(found):
        text = json.dumps(changed).encode()
        try:
            result = saved.decode(struct.pack("<Q", len(text)) + text + ends, tokens)
            n_taken += 1
            assert result.files[0].text is not None
        except StateError:
            n_refused += 1
    assert n_refused > n_taken
    for broken in (b"", section[:7], section[: 8 + n // 2], section[:-8], section + bytes(8)):
        with pytest.raises(StateError, match="inconsistent"):
            saved.decode(broken, tokens)
    later = json.dumps(found | {"format": 2}).encode()
    with pytest.raises(StateError, match="format 2, expected 1"):
        saved.decode(struct.pack("<Q", len(later)) + later + ends, tokens)


# identity


def test_identity(tmp_path: Path) -> None:
    """Breaks when two models share a digest, or one model has two."""
    paths = {
        "one": make_tiny_gguf(tmp_path / "one.gguf"),
        "same": make_tiny_gguf(tmp_path / "same.gguf"),
        "seed": make_tiny_gguf(tmp_path / "seed.gguf", seed=1),
        "vocabulary": make_tiny_gguf(tmp_path / "vocab.gguf", n_vocab=600),
    }
    found = {name: identity.of_model(path) for name, path in paths.items()}
    assert found["one"] == found["same"]
    assert found["one"].exact != found["seed"].exact
    assert found["one"].family != found["seed"].family
    assert found["one"].tokenizer == found["seed"].tokenizer != found["vocabulary"].tokenizer
    reader = gguf.GGUFReader(paths["same"], "r+")  # one weight of the middle
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_k.weight")
    tensor.data[0, 0] += 1
    reader.data.flush()
    os.utime(paths["same"], (1, 1))
    assert identity.of_model(paths["same"]).exact != found["one"].exact
    data = paths["one"].read_bytes()
    for length in (4, 20, 100, 4000):
        (tmp_path / "short.gguf").write_bytes(data[:length])
        os.utime(tmp_path / "short.gguf", (length, length))
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            identity.of_model(tmp_path / "short.gguf")
