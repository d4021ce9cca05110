"""Prompts around documents: chat templates rendered in pieces, and tokens that a document's text cannot forge.

A chat template is rendered once with sentinels where texts will stand; what lies between them are template pieces.
Control tokens come from template pieces only. Between two control tokens, everything (the plain end of one piece, the
document, the plain head of the next) is one *run* and is tokenised as one text without special tokens, so that it
merges as when the model was trained, and so that "<|end|>" in a document stays text.

A `Cursor` is a place in a prompt that is being built: what the session holds, and the text of a run that is still open
(no control token has ended it). Of an open run only those tokens are read that no continuation can change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, LlamaChatCompletionHandlerRegistry
from numpy.typing import NDArray

from actqkv_cpp.errors import InternalError, ParameterError, unknown_name

Tokens: TypeAlias = NDArray[np.int32]

# For base models without a template.
_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Answer: ' + m['content'] + '\n\n' }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)

# Stand for texts while a template is rendered: private-use characters, which no template trims, splits or escapes.
_SENTINEL = "\ue000{}\ue001"

# Two continuations that share no first character class: tokens they agree on do not depend on what follows.
_CONTINUATIONS = ("Who", "1")

_ATTR_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_ATTR_MARKER = _ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
_RESYNC_BYTES = 64  # how far offsets look ahead when pieces and text disagree (normalising tokenizers)


def no_tokens() -> Tokens:
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt: a template piece (`template`), or text, of document `document` where that is not None.

    Raises:
        ParameterError: it is no text, or holds what UTF-8 cannot.
    """

    text: str
    template: bool = False
    document: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ParameterError(f"a text is a str, not {type(self.text).__name__}")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ParameterError(
                f"a text holds a lone surrogate, character {error.start:,}, which is no Unicode",
                'decode its bytes with errors="replace"',
            ) from None


@dataclass(frozen=True)
class Span:
    """Where a document lies: session tokens [start, start + len(ends)); the i-th of them ends at byte `ends[i]`."""

    document: int
    start: int
    ends: NDArray[np.int64]

    @property
    def end(self) -> int:
        return self.start + len(self.ends)


@dataclass(frozen=True)
class Cursor:
    """A place in a prompt: `n_past` tokens are in the session, the last `len(run_tokens)` of them from `run_text`."""

    n_past: int = 0
    run_text: str = ""
    run_tokens: Tokens = field(default_factory=no_tokens)

    @property
    def run_start(self) -> int:
        return self.n_past - len(self.run_tokens)


@dataclass(frozen=True)
class Step:
    """What carries a session from one cursor to the next: rewind to `keep`, then read `tokens`."""

    keep: int
    tokens: Tokens
    cursor: Cursor
    spans: tuple[Span, ...]


class _Renderer:
    """Stands in for the Llama of a chat handler of llama_cpp: keeps the prompt it is to complete, and says nothing."""

    verbose = False

    def __init__(self) -> None:
        self.prompt = ""
        self.stop: tuple[str, ...] = ()

    def tokenize(self, text: bytes, **_: Any) -> str:
        return text.decode()

    def create_completion(self, *, prompt: str, stop: Sequence[str | None], **_: Any) -> dict[str, Any]:
        self.prompt, self.stop = prompt, tuple(text for text in stop if text)
        choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}
        return {"id": "", "object": "text_completion", "created": 0, "model": "", "choices": [choice], "usage": {}}


def _rendered(handler: Any, messages: Any) -> _Renderer:
    renderer = _Renderer()
    handler(llama=renderer, messages=messages)
    return renderer


class ChatTemplate:
    """The chat template of a loaded model (a llama_cpp.Llama), in pieces.

    Args:
        chat_format: a chat format of llama_cpp that stands for the model's own template; None: that one.

    Attributes:
        stop: texts that end an answer, beside the tokens that do.

    Raises:
        ParameterError: an unknown chat format, or one that is no prompt around texts.
    """

    def __init__(self, llm: Any, chat_format: str | None = None) -> None:
        self.stop: tuple[str, ...] = ()
        self._render: Callable[[Any], str]
        if chat_format is None:
            model = llm._model
            text = llm.metadata.get("tokenizer.chat_template") or _PLAIN_TEMPLATE
            bos, eos = (model.token_get_text(t) if t >= 0 else "" for t in (model.token_bos(), model.token_eos()))
            formatter = Jinja2ChatFormatter(template=text, bos_token=bos, eos_token=eos)
            self._render = lambda messages: str(formatter(messages=messages).prompt)
            return
        known: Mapping[str, Any] = LlamaChatCompletionHandlerRegistry._chat_handlers | llm._chat_handlers
        if chat_format not in known:
            raise unknown_name("chat_format", chat_format, known)
        handler = known[chat_format]
        self._render = lambda messages: _rendered(handler, messages).prompt
        if self.pieces("user") is None:
            raise ParameterError(
                f"chat_format {chat_format!r} gives no prompt that a text stands in once",
                "use create_chat_completion with it, or leave chat_format out for the model's own template",
            )
        self.stop = _rendered(handler, [{"role": "user", "content": "text"}]).stop

    def pieces(self, *roles: str) -> list[str] | None:
        """The len(roles) + 1 pieces around messages of these roles, ending where the assistant's answer begins.

        None where the template refuses these roles, or drops, doubles or reorders their texts.
        """
        marks = [_SENTINEL.format(i) for i in range(len(roles))]
        messages: Any = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rest = self._render(messages)
        except Exception:  # templates raise what they like: raise_exception, TypeError, jinja2 errors
            return None
        pieces: list[str] = []
        for mark in marks:
            if rest.count(mark) != 1:
                return None
            piece, rest = rest.split(mark)
            pieces.append(piece)
        return [*pieces, rest]

    def first(self, *, system: bool) -> tuple[str, str | None, str]:
        """Pieces of the first turn: before the system text, between it and the user's, after the user's.

        The middle is None where there is no system text or no working system role: then everything goes into the
        user's turn.
        """
        if system and (found := self.pieces("system", "user")):
            return found[0], found[1], found[2]
        found = self.pieces("user") or ["", "\n"]
        return found[0], None, found[1]

    def following(self) -> tuple[str, str]:
        """Pieces of a later turn: between the assistant's text and the user's, after the user's."""
        found = self.pieces("user", "assistant", "user")
        if found:
            return found[2], found[3]
        first, _, last = self.first(system=False)
        return first, last

    def inserted(self) -> tuple[str, str, str] | None:
        """Pieces around a system text between an answer and a user's text; None where there is no such place."""
        found = self.pieces("user", "assistant", "system", "user")
        return (found[2], found[3], found[4]) if found else None


class Encoder:
    """Turns parts into tokens for one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._markers: set[str] = set()  # texts that only a template piece may turn into their token
        self._pieces: dict[int, bytes] = {}

    def extend(self, cursor: Cursor, parts: Sequence[Part], *, closed: bool) -> Step:
        """The step from `cursor` over `parts`.

        Args:
            closed: nothing will follow in the last run (the answer comes next), so all of it is read. Otherwise the
                tokens at its end that a continuation could change wait in the new cursor.
        """
        keep, start = cursor.n_past, cursor.run_start
        text, held = cursor.run_text, cursor.run_tokens
        out: list[Tokens] = []
        spans: list[Span] = []
        inside: list[tuple[int, int, int]] = []  # document, first and last byte in the open run

        def read(run: Tokens) -> None:
            nonlocal keep
            common = _common_prefix(run, held)
            keep = min(keep, start + common) if held.size else keep
            out.append(run[common:])
            spans.extend(self._spans(text, run, start, inside))

        items = self._items(parts)
        if cursor.n_past == 0 and self._model.add_bos_token() and items[:1] != [self._model.token_bos()]:
            items.insert(0, self._model.token_bos())
        for item in items:
            if isinstance(item, Part):
                if item.document is not None:
                    n_bytes = len(text.encode())
                    inside.append((item.document, n_bytes, n_bytes + len(item.text.encode())))
                text += item.text
                continue
            run = self.tokenize(text)
            read(run)
            out.append(np.array([item], np.int32))
            start += len(run) + 1
            text, held, inside = "", no_tokens(), []
        run = self.tokenize(text) if closed else self._settled(text)
        read(run)
        tokens = np.concatenate(out).astype(np.int32)
        if closed:
            text, run = "", run[:0]
        return Step(keep, tokens, Cursor(keep + len(tokens), text, run), tuple(spans))

    def tokenize(self, text: str) -> Tokens:
        """Tokens [n] of a run's text, none of them a control token or a marker of the template."""
        while text:
            tokens = np.concatenate([self._plain(piece) for piece in self._broken(text)])
            forged = {t for t in np.unique(tokens).tolist() if self._attr(t) & _ATTR_CONTROL and not self._unknown(t)}
            if not forged:
                return tokens
            # SPM merges characters into whatever piece spells them, control tokens too ("</s>" from "</" and "s>").
            found = {self._model.token_get_text(t) for t in forged}
            if found <= self._markers:
                raise InternalError(f"the tokenizer makes control tokens {sorted(found)} of plain text")
            self._markers |= found
        return no_tokens()

    def piece(self, token: int) -> bytes:
        """Bytes of a token as text."""
        if token not in self._pieces:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, True)
                if n >= 0:
                    break
                size = -n
            self._pieces[token] = buffer.raw[:n]
        return self._pieces[token]

    def _plain(self, text: str) -> Tokens:
        return np.array(self._model.tokenize(text.encode(), add_bos=False, special=False), np.int32)

    def _broken(self, text: str) -> list[str]:
        """`text` cut inside every marker, so that no piece spells one."""
        cuts = {0, len(text)}
        for marker in self._markers:
            at = text.find(marker)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(marker, at + 1)
        order = sorted(cuts)
        return [text[a:b] for a, b in pairwise(order)]

    def _settled(self, text: str) -> Tokens:
        """The first tokens of `text` that stay the same whatever follows it."""
        if not text:
            return no_tokens()
        one, two = (self.tokenize(text + more) for more in _CONTINUATIONS)
        return one[: _common_prefix(one, two)]

    def _items(self, parts: Sequence[Part]) -> list[Part | int]:
        """Parts with the control tokens of template pieces as numbers between them."""
        items: list[Part | int] = []
        for part in parts:
            items.extend(self._template_items(part.text) if part.template else [part])
        return [item for item in items if not isinstance(item, Part) or item.text]

    def _template_items(self, piece: str) -> list[Part | int]:
        items: list[Part | int] = []
        at = 0
        stripping = False
        for token in self._model.tokenize(piece.encode(), add_bos=False, special=True):
            attr = self._attr(token)
            name = self._model.token_get_text(token)
            found = piece.find(name, at) if attr & _ATTR_MARKER else -1
            if found < 0:
                continue
            text = piece[at:found].rstrip() if attr & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP else piece[at:found]
            items += [Part(text.lstrip() if stripping else text), token]
            self._markers.add(name) if attr & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED else None
            stripping = bool(attr & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP)
            at = found + len(name)
        return [*items, Part(piece[at:].lstrip() if stripping else piece[at:])]

    def _spans(self, text: str, run: Tokens, start: int, inside: list[tuple[int, int, int]]) -> list[Span]:
        """Spans of the documents at bytes `inside` of the run `text`, whose tokens `run` begin at `start`."""
        if not inside:
            return []
        ends = self._byte_ends(text.encode(), run.tolist())
        spans = []
        for document, begin, end in inside:
            first = int(np.searchsorted(ends, begin, side="right"))
            last = min(int(np.searchsorted(ends, end, side="left")) + 1, len(run))
            spans.append(Span(document, start + first, np.clip(ends[first:last], begin, end) - begin))
        return spans

    def _byte_ends(self, text: bytes, tokens: list[int]) -> NDArray[np.int64]:
        """ends[i]: bytes of `text` that tokens 0 .. i cover, their pieces checked against the text."""
        pieces = [self.piece(token) for token in tokens]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        joined = b"".join(pieces)
        if text.startswith(joined):
            return ends
        if joined.startswith(b" ") and text.startswith(joined[1:]):  # the space that SPM puts before a text
            return ends - 1
        at = 0
        for i, piece in enumerate(pieces):
            near = text[at : at + _RESYNC_BYTES + len(piece)]
            found = [(near.find(form), len(form)) for form in (piece, piece.removeprefix(b" ")) if form in near]
            if found:
                skipped, length = min(found)
                at += skipped + length
            ends[i] = at
        return ends

    def _attr(self, token: int) -> int:
        return int(self._model.token_get_attr(token))

    def _unknown(self, token: int) -> bool:
        """Whether a token is only the tokenizer's word for a character it has no piece for."""
        return bool(self._attr(token) & llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN)


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n
