"""Breaks when an answer ends within a character, shows what does not belong to it, or tells another end than it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from actqkv_cpp import Llama, Retrieval
from actqkv_cpp.answering import _Stream

SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=128)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"caf\xc3", b"\xa9"], "caf\u00e9"),
        ([b"caf\xc3"], "caf"),  # cut by max_tokens within a character
        ([b"caf\xff", b"e"], "caf\ufffde"),
        ([b"one ", b"STOP\xe2\x80"], "one "),
        ([b"one S", b"T"], "one ST"),
    ],
)
def test_characters_of_several_tokens(pieces: list[bytes], text: str) -> None:
    """Breaks when half a character ends an answer as a replacement mark, or stands behind a stop text."""
    shown: list[str] = []
    stream = _Stream(("STOP",), shown.append)
    for piece in pieces:
        stream.push(piece)
    stream.end()
    assert (stream.text, "".join(shown)) == (text, text)


def test_on_text_that_has_enough() -> None:
    """Breaks when on_text is called again after it ended the answer."""
    shown: list[str] = []
    stream = _Stream(("STOP",), lambda piece: bool(shown.append(piece)))
    stream.push(b"one S")
    stream.end()
    assert shown == ["one "]


def test_ended_as_the_context_fills(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when an answer that is ended with the last token of n_ctx is told as cut by it."""
    with Llama(tiny_model, n_ctx=128, n_threads=1, verbose=False, retrieval=SMALL) as llm:
        doc = llm.read(text="the key")
        monkeypatch.setattr(llm._encoder, "piece", lambda token: b"x")
        answer = doc.ask("where", min_tokens=128, max_tokens=None, on_text=lambda piece: llm.n_tokens < 128)
        assert (answer.finish_reason, answer.context_full) == ("cancelled", False)
