"""Breaks when a state that is damaged, foreign or forged is taken, changes the session it was refused by, or crashes.

The layout and the checksum are written down here a second time, from the description in native/session/state.cpp.
"""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import in_child, loaded, one_by_one, open_session, random_tokens, read, small
from llama_cpp._internals import LlamaModel

from actqkv_cpp import ActqkvError, Retrieval, StateError
from actqkv_cpp._actqkv import ffi
from actqkv_cpp._native import Session

RETRIEVAL = small(summary="kv_head", score="cosine", refine=1, question_weight=4.0)
TOKENS = random_tokens(120)
N_PAST = 112
MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_head_kv": 1}
N_LAYER = 2

WORD = (1 << 64) - 1
N_PARAMS = ffi.sizeof("struct actqkv_params")
AT_VERSION, AT_PARAMS = 8, 24
AT_TOKENS = AT_PARAMS + 2 * N_PARAMS  # of reading and of answering; then n_tokens, n_done, n_closed


def checksum(data: bytes) -> int:
    """Of words of 8 bytes, then of the bytes that are left: xor, multiply, xor-shift."""
    return mixed(len(data), data)


def mixed(value: int, data: bytes) -> int:
    """The checksum `value` of what came before, whole words, and of `data`."""

    def mix(value: int, word: int) -> int:
        value = (value ^ word) * 0x9E3779B97F4A7C15 & WORD
        return value ^ value >> 29

    whole = len(data) // 8 * 8
    for (word,) in struct.iter_unpack("<Q", data[:whole]):
        value = mix(value, word)
    for byte in data[whole:]:
        value = mix(value, byte)
    return value


def signed(body: bytes) -> bytes:
    return body + struct.pack("<Q", checksum(body))


def written(blob: bytes, at: int, value: bytes) -> bytes:
    """The blob with `value` at `at`, and a checksum to match."""
    return signed(blob[:at] + value + blob[at + len(value) : -8])


@dataclass
class Fields:
    """Where a blob's numbers lie: counts of arrays, and other 8-byte fields by name."""

    counts: list[int]
    numbers: dict[str, int]
    end: int  # of all but K, V and summaries


def fields_of(blob: bytes) -> Fields:
    fields, at = Fields([], {}, 0), AT_TOKENS

    def number(name: str, size: int = 8) -> int:
        nonlocal at
        fields.numbers[name] = at
        at += size
        return int.from_bytes(blob[at - size : at], "little")

    def array(element: int) -> None:
        nonlocal at
        fields.counts.append(at)
        at += 8 + element * struct.unpack_from("<Q", blob, at)[0]

    def memory(of: str) -> None:
        for layer in range(N_LAYER):
            array(4)  # mean
            array(4)  # variance
            number(f"{of}: tokens seen, layer {layer}")
            number(f"{of}: windows seen, layer {layer}")
            array(8)  # entropies
            for _ in range(3):  # question, the queries asked, their attention
                array(4)

    def recent() -> None:
        array(2)  # keys
        array(4)  # attention sums

    n_tokens = number("n_tokens")
    number("n_done")
    number("n_closed")
    at += 5 * n_tokens
    memory("now")
    recent()
    for i in range(number("n_checkpoints")):
        number(f"checkpoint {i}: n_past")
        number(f"checkpoint {i}: n_closed")
        number(f"checkpoint {i}: pinned", 1)
        memory(f"checkpoint {i}")
        recent()
    fields.end = at
    return fields


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_gguf(tmp_path_factory.mktemp("state") / "model.gguf", **MODEL)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaModel]:
    with loaded(path) as opened:
        yield opened


def fill(session: Session) -> None:
    read(session, TOKENS, [(70, "prefill"), (20, "question"), *one_by_one(2), (20, "prefill")], n_logits=0)
    session.checkpoint()


@pytest.fixture(scope="module")
def blob(model: LlamaModel) -> bytes:
    with open_session(model, RETRIEVAL) as session:
        fill(session)
        assert session.n_past == N_PAST
        return bytes(session.state_get())


@pytest.fixture
def session(model: LlamaModel) -> Iterator[Session]:
    """A session with a history of its own, which every refusal must leave as it is."""
    with open_session(model, RETRIEVAL) as found:
        found.decode(TOKENS[:50])
        yield found


def refuse(session: Session, blob: bytes, match: str | None = None) -> None:
    before = bytes(session.state_get())
    with pytest.raises(StateError, match=match) as caught:
        session.state_set(blob)
    assert "\n" not in str(caught.value)
    assert session.state_get() == before


def test_the_layout_is_as_described(blob: bytes) -> None:
    """Breaks when the description of the state in state.cpp, or its checksum, is no longer true."""
    assert blob[:8] == b"AKVSTATE"
    assert signed(blob[:-8]) == blob
    fields = fields_of(blob)
    assert struct.unpack_from("<qq", blob, AT_TOKENS) == (N_PAST, N_PAST)
    assert struct.unpack_from("<q", blob, fields.numbers["checkpoint 0: n_past"])[0] == 64
    n_closed = struct.unpack_from("<q", blob, fields.numbers["n_closed"])[0]
    assert n_closed == (N_PAST - RETRIEVAL.n_local - RETRIEVAL.n_sink) // 8
    sinks, chunks = 3 * RETRIEVAL.n_sink, 2 * 8 * n_closed  # near and far keys, values; keys, values
    summaries = n_closed * (2 * 32 + 4)  # nothing of the index of so few
    assert fields.end == len(blob) - 8 - N_LAYER * ((sinks + chunks) * 2 * 32 + summaries)


def test_the_blob_itself_is_taken(session: Session, blob: bytes) -> None:
    """Breaks when the refusals below are for another reason than the damage."""
    session.state_set(blob)
    assert session.n_past == N_PAST
    session.state_set(memoryview(written(blob, AT_PARAMS, b"")))


@pytest.mark.parametrize("sign", [False, True], ids=["as it is", "with a checksum"])
def test_truncated(sign: bool, session: Session, blob: bytes) -> None:
    """Breaks when a blob that ends early is taken."""
    n = len(blob)
    for length in [n * i // 8 for i in range(8)] + [1, 7, 8, 15, 16, 63, 64, AT_TOKENS, n - 9, n - 8, n - 1]:
        cut = blob[:length]
        refuse(session, signed(cut[:-8]) if sign and length >= 8 else cut)


def test_longer_than_it_should_be(session: Session, blob: bytes) -> None:
    """Breaks when bytes behind the state go unnoticed."""
    refuse(session, blob + b"\0")
    refuse(session, signed(blob[:-8] + bytes(64)), "bytes of K and V")


def test_every_damaged_byte_is_noticed(session: Session, blob: bytes) -> None:
    """Breaks when the checksum does not cover the whole blob."""
    for at in [*range(16, 200, 7), *np.linspace(200, len(blob) - 1, 60).astype(int)]:
        damaged = bytearray(blob)
        damaged[at] ^= 0x10
        refuse(session, bytes(damaged), "damaged or truncated")


def test_not_a_state(session: Session, path: Path) -> None:
    """Breaks when something else altogether is not named as such."""
    for other in (b"", b"not a state", bytes(4096), path.read_bytes()[:5000]):
        refuse(session, other, "not a state of actqkv")


def test_another_version(session: Session, blob: bytes) -> None:
    """Breaks when the state of a later version is read as if it were of this one."""
    refuse(session, written(blob, AT_VERSION, struct.pack("<I", 99)), "version is 99, expected 5")


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "other weights": {"seed": 1},
    "a layer more": {"n_layer": 3},
    "more KV heads": {"n_head_kv": 2},
    "another architecture": {"arch": "qwen3"},
    "another vocabulary": {"n_vocab": 600},
    "another type": {"quantisation": "F16"},
    "another trained length": {"n_ctx_train": 4096},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model(name: str, blob: bytes, tmp_path: Path) -> None:
    """Breaks when a state is taken by a model that did not make it."""
    other = tiny.make_tiny_gguf(tmp_path / "model.gguf", **MODEL | OTHER_MODELS[name])
    with loaded(other) as model, open_session(model, RETRIEVAL) as session:
        refuse(session, blob, "another model")


def with_columns(**columns: Any) -> Retrieval:
    base = {"summary": "kv_head", "score": "cosine", "refine": 1, "question_weight": 4.0}
    return small(**base | columns)


OTHER_PARAMETERS: dict[str, dict[str, Any]] = {
    "sinks": {"n_sink": 0},
    "local": {"n_local": 40, "budget": 84},
    "chunk": {"chunk": 16},
    "window": {"window": 8},
    "budget": {"budget": 84},
    "positions": {"positions": "exact"},
    "summary": {"summary": "head"},
    "score": {"score": "dot"},
    "refine": {"refine": 2},
    "question_weight": {"question_weight": 1.0},
    "method": {"method": "published"},
    "temperature": {"cutoff_temperature": 0.5},
}


@pytest.mark.parametrize("name", OTHER_PARAMETERS)
def test_other_parameters(name: str, model: LlamaModel, blob: bytes) -> None:
    """Breaks when a state is taken by a session that would have read its tokens in another way."""
    with open_session(model, with_columns(**OTHER_PARAMETERS[name])) as session:
        refuse(session, blob, "other parameters")


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_another_kv_type(kv_type: str, model: LlamaModel, blob: bytes) -> None:
    """Breaks when chunks of one type are read as those of another."""
    with open_session(model, RETRIEVAL, kv_type=kv_type) as session:
        refuse(session, blob, "other parameters .*kv_type")


def test_too_small_n_ctx(model: LlamaModel, blob: bytes) -> None:
    """Breaks when a state is taken by a session that it does not fit."""
    with open_session(model, RETRIEVAL, n_ctx=N_PAST - 1) as session:
        refuse(session, blob, f"holds {N_PAST} tokens, n_ctx is {N_PAST - 1}")
    with open_session(model, RETRIEVAL, n_ctx=N_PAST) as session:
        session.state_set(blob)
        assert session.n_past == N_PAST


def test_tokens_and_phases_are_checked(session: Session, blob: bytes) -> None:
    """Breaks when a forged token reaches the embedding, or a forged phase the planner."""
    tokens = AT_TOKENS + 24
    for value in (-1, 512, 1 << 30):
        refuse(session, written(blob, tokens + 4 * 17, struct.pack("<i", value)), "inconsistent at token 17")
    for value in (-1, 3):
        refuse(session, written(blob, tokens + 4 * N_PAST + 9, struct.pack("<b", value)), "inconsistent at token 9")


# ---- forged blobs, in a child process


def forged_counts(blob: bytes) -> Iterator[bytes]:
    """Every count of an array replaced by others: none of them fits the bytes that follow."""
    for at in fields_of(blob).counts:
        (count,) = struct.unpack_from("<Q", blob, at)
        for value in {0, 1, count - 1, count + 1, 2 * count, 1 << 31, 1 << 40, 1 << 61, 1 << 63, WORD} - {count}:
            yield written(blob, at, struct.pack("<Q", value & WORD))


def forged_numbers(blob: bytes) -> Iterator[bytes]:
    """Every other number replaced by extreme ones."""
    for name, at in fields_of(blob).numbers.items():
        if name.endswith("pinned"):
            yield written(blob, at, b"\xff")
            continue
        (number,) = struct.unpack_from("<q", blob, at)
        for value in (-1, 0, 1, number - 1, number + 1, N_PAST, 1 << 20, 1 << 62, -(1 << 63)):
            yield written(blob, at, struct.pack("<q", value))
        for real in (float("nan"), float("inf"), -1.0, 1e300):
            yield written(blob, at, struct.pack("<d", real))


def forged_bytes(blob: bytes) -> Iterator[bytes]:
    """Random bytes at random places, most of them in front of K and V."""
    rng = np.random.default_rng(0)
    end = fields_of(blob).end
    for i in range(200):
        body = bytearray(blob[:-8])
        for at in rng.integers(AT_TOKENS, end if i % 4 else len(body), 1 + i % 5):
            body[at] = int(rng.integers(256))
        yield signed(bytes(body))


FORGERIES: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "counts": forged_counts,
    "numbers": forged_numbers,
    "bytes": forged_bytes,
}


def try_forgeries(path: str, kind: str) -> None:
    """Set every forged blob, use what was taken, and print how many were refused and taken. Runs in a child."""
    n_refused = n_taken = 0
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with loaded(Path(path)) as model, open_session(model, RETRIEVAL, n_ctx=300) as session:
        fill(session)
        blob = bytes(session.state_get())
        expected = session.decode(TOKENS[:3], phase="decode", n_logits=1)
        for forged in FORGERIES[kind](blob):
            try:
                session.state_set(forged)
                n_taken += 1
            except StateError:
                n_refused += 1
                continue
            try:
                session.decode(TOKENS[:20], n_logits=1)
                session.decode(TOKENS[:2], phase="decode", n_logits=1)
                for cut in (100, 70, 3, 0):
                    session.rewind(min(cut, session.n_past))
                    session.decode(TOKENS[:2], phase="question")
            except ActqkvError as error:
                print(error, file=sys.stderr)
        session.state_set(blob)
        np.testing.assert_array_equal(session.decode(TOKENS[:3], phase="decode", n_logits=1), expected)
    print(n_refused, n_taken)


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged(kind: str, path: Path) -> None:
    """Breaks when a blob with a matching checksum reads or writes out of bounds, takes memory, or ruins the session."""
    said = in_child(f"import test_state_errors; test_state_errors.try_forgeries({str(path)!r}, {kind!r})")
    n_refused, n_taken = map(int, said.split())
    assert n_refused + n_taken > 100
    assert n_refused > 0
    assert n_taken == 0 or kind != "counts"
