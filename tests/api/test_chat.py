"""Breaks when a conversation loses documents or turns: readings that were interrupted, branches, going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actqkv_cpp import Cancelled, Chat, Llama, Retrieval, StateError

SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=128)
TEXT = "A weaver described the second vase near the shore. They slowly counted the golden rug by the fence. " * 3


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[Llama]:
    with Llama(tiny_model, n_ctx=1024, n_threads=1, retrieval=SMALL, verbose=False) as llm:
        yield llm


def _read_until(at: int, read: Callable[..., object]) -> None:
    """Cancel a reading after `at` tokens."""
    with pytest.raises(Cancelled):
        read(progress=lambda done, total: done < at)


def _told(chat: Chat) -> list[int]:
    """Tokens of the session up to the next turn."""
    return chat.llm.input_ids[: chat.n_tokens].tolist()


def test_resume(llm: Llama) -> None:
    """An interrupted reading is read on otherwise than it would have been read, or what was said on it stays."""
    chats = []
    for interrupted in (False, True):
        chat = llm.chat(system="the house")
        chat.say("who", max_tokens=2)
        if interrupted:
            _read_until(64, lambda progress, chat=chat: chat.read(text=TEXT, name="one", progress=progress))
            chat.say("where", max_tokens=2)
            chat.read(text="the key", name="two")
            _read_until(96, lambda progress, chat=chat: chat.resume(progress=progress))
            assert (chat.documents, len(chat.turns)) == (["one"], 1)
            assert 96 <= chat.readings[0].n_read < chat.readings[0].n_total
            chat.ask("where", max_tokens=2)
            chat.resume()
            chat.resume()
        else:
            chat.read(text=TEXT, name="one")
        chats.append((_told(chat), chat.documents, chat.say("the key", max_tokens=8, min_tokens=8).text))
        assert all(reading.n_read == reading.n_total for reading in chat.readings)
    assert chats[0] == chats[1]


def test_resume_where_not_a_word_was_read(llm: Llama) -> None:
    """A reading that stopped inside the system text is read on over what was said meanwhile."""
    system = "the house and the key " * 20
    whole = llm.chat(system=system)
    whole.read(text=TEXT)
    expected = _told(whole)
    chat = llm.chat(system=system)
    _read_until(32, lambda progress: chat.read(text=TEXT, progress=progress))
    assert (chat.documents, chat.readings[0].n_read) == ([], 32)
    chat.say("who", max_tokens=2)
    chat.resume()
    assert (_told(chat), chat.turns) == (expected, ())


def test_a_branch_keeps_its_part(llm: Llama) -> None:
    """Reading on in one branch changes what another knows, or is not possible in both."""
    one = llm.chat(system="the house")
    _read_until(64, lambda progress: one.read(text=TEXT, progress=progress))
    other = one.branch()
    one.resume()
    told = _told(one)
    assert other.readings[0].n_read == 64
    other.say("who", max_tokens=2)
    assert other.n_tokens < one.n_tokens
    other.resume()
    assert _told(other) == told


def test_branch_with_a_document_of_its_own(llm: Llama) -> None:
    """A document that is gone from the session is answered from, read again unasked, or cannot be read again."""
    one = llm.chat(system="the house")
    one.say("who", max_tokens=2)
    other = one.branch()
    other.read(text=TEXT, name="two")
    other.say("where", max_tokens=2)
    told = _told(other)
    one.say("where", max_tokens=2)
    for use in (other.say, other.ask, lambda text: other.read(text=text)):
        with pytest.raises(StateError, match=r"^two: in the session no longer"):
            use("who")
    assert (one.missing, other.missing) == ([], ["two"])
    seen: list[tuple[int, int]] = []
    _read_until(64, lambda progress: other.restore(progress=progress))
    n_held = llm.n_tokens
    other.restore(progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] > 64
    assert seen[-1] == (other.readings[0].n_read,) * 2 == max(seen)
    assert (_told(other), other.missing) == (told, [])
    assert one.n_tokens < n_held < other.n_tokens
    fresh = one.branch(1)
    fresh.read(text=TEXT, name="two")
    other.restore()
    fresh.say("where", max_tokens=2)
    expected = fresh.say("the key", max_tokens=8, min_tokens=8).text
    assert other.say("the key", max_tokens=8, min_tokens=8).text == expected


def test_restore_of_a_part(llm: Llama) -> None:
    """Of a document that was read in part, all is read again, or less than there was."""
    one = llm.chat(system="the house")
    other = one.branch()
    _read_until(64, lambda progress: other.read(text=TEXT, progress=progress))
    other.say("who", max_tokens=2)
    told, n_read = _told(other), other.readings[0].n_read
    one.say("where", max_tokens=2)
    other.restore()
    assert (_told(other), other.readings[0].n_read) == (told, n_read)
