"""When this fails, an answer over a long history depends on how the history came to be, or on a damaged index.

Closed chunks are indexed by stretches of 65,536 tokens, then of 16,384, of 4,096 and of 1,024; what is left over is the
rest, in order (native/kv/stretches.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_support
import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import index_bytes, loaded, random_tokens, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray
from test_kv_file_errors import CHUNK, INDEX, N_ARRAYS, Layout, layout_of, put, with_slots
from test_state_errors import MODEL, checksum, mixed

from actqkv_cpp import StateError, kvfile
from actqkv_cpp._native import Session

N_LAYER, D = MODEL["n_layer"], 32  # of the head of keys
SINK, LOCAL = 4, 256
RETRIEVAL = small(n_local=LOCAL, window=256, chunk=CHUNK, budget=SINK + LOCAL + 6 * CHUNK, scan=256)
LEVELS = (65_536, 16_384, 4096, 1024)
STRETCH, ALL_LEVELS = LEVELS[0], sum(LEVELS)
N_CTX = 90_000
TOKENS, OTHERS, ANSWER = random_tokens(N_CTX), random_tokens(6000, seed=1), random_tokens(5, seed=2)
LENGTHS = [
    SINK + LOCAL + 1024,  # one stretch and nothing beside it
    2300,
    SINK + LOCAL + 4096 + 2 * 1024 + 500,
    SINK + LOCAL + 16_384 + 1024 + 40,
    SINK + LOCAL + ALL_LEVELS + 40,
]
LONGEST = LENGTHS[-1]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_gguf(tmp_path_factory.mktemp("index") / "model.gguf", **MODEL)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaModel]:
    with loaded(model_path) as opened:
        yield opened


def open_session(model: LlamaModel, **options: Any) -> Session:
    return engine_support.open_session(model, RETRIEVAL, n_ctx=N_CTX, **options)


Answer = list[NDArray[np.float32]]


def steps(session: Session) -> Answer:
    """Logits, plans and votes of a few answered tokens."""
    n, found = session.n_past, []

    def observe(name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        if n_past >= n and name in {"plan", "scores"}:
            found.append(data)

    session.observer = observe
    found += [session.decode([token], phase="decode", n_logits=1) for token in ANSWER]
    session.observer = None
    return found


def answer(session: Session) -> Answer:
    """Such steps, which are forgotten then."""
    n = session.n_past
    session.checkpoint()
    found = steps(session)
    session.rewind(n)
    return found


def check_same(found: Answer, expected: Answer) -> None:
    assert len(found) == len(expected) == len(ANSWER) * (1 + 2 * N_LAYER)  # logits; plan and votes of each layer
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def expected(model: LlamaModel) -> Callable[[int], Answer]:
    """The answer of a session that read TOKENS up to a length at once."""
    known: dict[int, Answer] = {}

    def of(n: int) -> Answer:
        if n not in known:
            with open_session(model) as session:
                session.decode(TOKENS[:n])
                known[n] = answer(session)
        return known[n]

    return of


def read_to(session: Session, *ends: int) -> None:
    for end in ends:
        session.decode(TOKENS[session.n_past : end])


def in_pieces(session: Session, n: int) -> Session:
    read_to(session, *range(97, n, 530), n)
    return session


def with_answers_between(session: Session, n: int) -> Session:
    """Also where one long stretch is about to take the place of three, and has taken it."""
    for end in (*range(700, 6000, 900), 17_700, STRETCH, STRETCH + 600, n):
        if end <= n:
            read_to(session, end)
            answer(session)
    return session


def after_another_text(session: Session, n: int) -> Session:
    """Of the same length, whose whole index is forgotten at once."""
    read_to(session, 500)
    session.decode(np.resize(OTHERS, n - 500))
    answer(session)
    session.rewind(500)
    read_to(session, n)
    return session


def blob_of_a_blob(session: Session, n: int) -> Session:
    """A state taken after an answer, in a session that had indexed something else."""
    read_to(session, n)
    answer(session)
    other = open_session(session.model)
    other.decode(OTHERS[: min(n, len(OTHERS))])
    answer(other)
    other.state_set(session.state_get())
    session.close()
    return other


WAYS: dict[str, Callable[[Session, int], Session]] = {
    "pieces": in_pieces,
    "answers between": with_answers_between,
    "another text": after_another_text,
    "state": blob_of_a_blob,
}


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_history(model: LlamaModel, expected: Callable[[int], Answer], way: str, n: int) -> None:
    """Bit for bit: stretches that another history left behind, or that are not made anew, would show."""
    session = WAYS[way](open_session(model), n)
    with session:
        assert session.n_past == n
        check_same(answer(session), expected(n))
        check_same(answer(session), expected(n))


@pytest.mark.parametrize("n", LENGTHS)
def test_every_way_back(model: LlamaModel, expected: Callable[[int], Answer], n: int) -> None:
    """Within the rest, and over the borders of stretches of every length: to other text, and to what there was."""
    starts = sorted({n - 20, n - 300, n - n % 1024, 3 * n // 4, 1000})
    with open_session(model) as session:
        for start in starts:
            read_to(session, start)
            session.checkpoint()  # so that no more is forgotten than must be
        read_to(session, n)
        check_same(answer(session), expected(n))
        for start in reversed(starts):
            session.rewind(start)
            session.decode(OTHERS[:1100])
            found = answer(session)
            if n < LONGEST or start == 3 * n // 4:  # not each time, for the time that it takes
                with open_session(model) as other:
                    read_to(other, start)
                    other.decode(OTHERS[:1100])
                    check_same(found, answer(other))
            session.rewind(start)
            read_to(session, n)
            check_same(answer(session), expected(n))


@pytest.mark.parametrize("border", [1024, 3072, 4096, 16_384, STRETCH])
def test_long_answers(model: LlamaModel, border: int) -> None:
    """Over a border of stretches. Breaks when what is added to an index step by step is not what one made anew has."""
    with open_session(model) as session, open_session(model) as other:
        read_to(session, SINK + LOCAL + border - 12)
        for _ in range(6):
            steps(session)
            session.decode(OTHERS[:30])
            other.state_set(session.state_get())
            check_same(steps(other), steps(session))
        assert session.n_chunks * CHUNK >= border + 40


@pytest.mark.parametrize("n_threads", [2])
def test_threads_make_the_same_index(model: LlamaModel, expected: Callable[[int], Answer], n_threads: int) -> None:
    """Votes of several threads are added up in another order; which stretches there are is the same."""
    n = LENGTHS[1]
    with open_session(model, n_threads=n_threads) as session:
        read_to(session, n)
        for found, one in zip(answer(session), expected(n), strict=True):
            np.testing.assert_allclose(found, one, rtol=1e-3, atol=1e-3)


CHUNKS = [(1, 2100), (3, 700), (33, 150), (48, 50), (512, 7), (520, 6), (600, 5), (682, 5), (1000, 7), (1024, 7)]
CHUNKS += [(33, 2656)]  # of every level, and more


def with_chunks(model: LlamaModel, chunk: int, scan: int = 256, kv_type: str = "f16") -> Session:
    """Of which a step attends one."""
    least = SINK + LOCAL + chunk
    retrieval = small(n_local=LOCAL, window=256, chunk=chunk, budget=least, representatives=1, scan=scan)
    return engine_support.open_session(model, retrieval, n_ctx=N_CTX, kv_type=kv_type)


def check_votes(of_step: NDArray[np.float32]) -> None:
    """What hardly counts is left out of the two heads' attention, but it is less than half of it here."""
    assert (of_step >= 0).all()
    assert 1 < of_step.sum() < 2 * (1 + 1e-4)


@pytest.mark.parametrize(("chunk", "n_chunks"), CHUNKS)
def test_chunks_of_any_size(model: LlamaModel, chunk: int, n_chunks: int) -> None:
    """Breaks when chunks of no longer stretch share memory: six, where they have between 512 and 1024 tokens."""
    answers, n = [], SINK + LOCAL + n_chunks * chunk
    step = max(chunk, 300) if n < 10_000 else 20 * chunk
    for ends in ((n,), range(n % step, n + 1, step)):
        with with_chunks(model, chunk) as session:
            for end in ends:
                read_to(session, end)
                answers.append(answer(session))
            assert session.n_chunks == n_chunks
    check_same(answers[-1], answers[0])
    votes = [array for array in answers[0] if n_chunks <= array.shape[-1] <= n_chunks + len(ANSWER)]  # some close
    assert len(votes) == N_LAYER * len(ANSWER)
    for of_step in votes:
        check_votes(of_step)
        some = of_step[of_step > 0]
        if chunk > 512 and n_chunks < 10:
            assert len(set(some)) == len(some) > n_chunks / 2, "the same keys, twice"


def test_the_least_scan_looks_into_a_cell(model: LlamaModel) -> None:
    """Breaks when a history that is divided altogether is not looked at: its first chunks would be taken."""
    retrieval = small(n_local=LOCAL, window=256, chunk=CHUNK, budget=SINK + LOCAL + 6 * CHUNK, scan=1)
    with engine_support.open_session(model, retrieval, n_ctx=N_CTX) as session:
        read_to(session, LENGTHS[0])
        votes = [array for array in answer(session) if array.shape == (1024 // CHUNK,)]
    assert len(votes) == N_LAYER * len(ANSWER)
    for of_step in votes:
        check_votes(of_step)
        assert 1 <= (of_step > 0).sum() < 128


def test_copies_are_indexed(model: LlamaModel) -> None:
    """A history that was made long by copies goes on in another session as it does here, whatever was there before."""
    with open_session(model) as session, open_session(model) as other:
        read_to(session, LONGEST)
        session.rewind(512)
        session.decode(OTHERS[:1024])
        session.repeat(256 * 270)
        assert session.n_chunks > STRETCH // CHUNK
        other.state_set(session.state_get())
        check_same(answer(other), answer(session))


# ---- KV files


def write_file(model: LlamaModel, path: Path, n: int, *, stop: int | None = None, spill: bool = False) -> None:
    """A file of n tokens; stop: read no further."""
    with open_session(model) as session:
        kvfile.begin(session, path, TOKENS[:n], np.zeros(n, np.int8), b"", checkpoint_tokens=4096)
        if spill:
            kvfile.spill(session)
        read_to(session, stop or n)
        kvfile.end(session)


def opened(model: LlamaModel, path: Path, *, write: bool = False) -> Session:
    return kvfile.open_session(model, path, n_ctx=N_CTX, n_threads=1, write=write)


@pytest.mark.parametrize("spill", [False, True], ids=["kept", "spilled"])
@pytest.mark.parametrize("n", LENGTHS[1:])
def test_a_file_opened_again(
    model: LlamaModel, expected: Callable[[int], Answer], n: int, spill: bool, tmp_path: Path
) -> None:
    """Also twice, read on, and gone back over."""
    path = tmp_path / "a.akv"
    write_file(model, path, n, spill=spill)
    kvfile.verify(path)
    for _ in range(2):
        with opened(model, path) as session:
            check_same(answer(session), expected(n))
            session.decode(OTHERS[:1200])
            answer(session)
            session.rewind(n)
            check_same(answer(session), expected(n))
            session.rewind(n - 1200)
            session.decode(OTHERS[:1000])
            answer(session)
            session.rewind(n - 1200)
            read_to(session, n)
            check_same(answer(session), expected(n))


@pytest.mark.parametrize("stop", [9000, STRETCH + SINK + LOCAL - 100, LONGEST - 300])
def test_a_reading_that_went_on_later(
    model: LlamaModel, expected: Callable[[int], Answer], stop: int, tmp_path: Path
) -> None:
    """Breaks when the first long stretch is lost between two writers."""
    path = tmp_path / "a.akv"
    with open_session(model) as session:
        kvfile.begin(session, path, TOKENS[:LONGEST], np.zeros(LONGEST, np.int8), b"", checkpoint_tokens=2048)
        read_to(session, stop)
        kvfile.sync(session)
    with opened(model, path, write=True) as session:
        assert 0 < session.n_past <= stop
        read_to(session, LONGEST)
        kvfile.end(session)
        check_same(answer(session), expected(LONGEST))
    kvfile.verify(path)
    with opened(model, path) as session:
        check_same(answer(session), expected(LONGEST))


@pytest.fixture(scope="module")
def data(model: LlamaModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with one long stretch."""
    path = tmp_path_factory.mktemp("index") / "a.akv"
    write_file(model, path, LONGEST)
    found = path.read_bytes()
    assert layout_of(found).n_kept(INDEX, layout_of(found).n_chunks) == 1
    return found


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", [0.0, 0.003, 0.5, 0.97])
def test_a_damaged_index_is_an_error(model: LlamaModel, data: bytes, layer: int, part: float, tmp_path: Path) -> None:
    """Wherever in it one byte is another; until an answer needs it, the file can be read on."""
    layout, path = layout_of(data), tmp_path / "a.akv"
    at = layout.array(layer, INDEX) + int(part * layout.chunk_bytes[INDEX])
    path.write_bytes(put(data, at, bytes([data[at] ^ 0x10])))
    with pytest.raises(StateError, match=rf"of layer {layer} is not what was written"):
        kvfile.verify(path)
    with opened(model, path) as session:
        session.decode(OTHERS[:300])
        with pytest.raises(StateError, match=rf"of layer {layer} is not what was written"):
            session.decode(ANSWER[:1], phase="decode")


N_CELLS_MOST = STRETCH // 64 + STRETCH // 256 + 1
BLOCK = (4 * 4 + D // 2) * 16
AT_KEYS = 64 + -(-N_CELLS_MOST // 16) * BLOCK


def place(i: int) -> int:
    """Where the last number of cell i lies: its keys' first sixteen times 256, and how many they are, less one."""
    return 64 + (i // 16 + 1) * BLOCK - 4 * (16 - i % 16)


def number(index: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", index, at)[0])


def chunk_of(index: bytes, i: int, key: int) -> int:
    """Where the chunk of a cell's key lies."""
    first, n = divmod(number(index, place(i)), 256)
    return AT_KEYS + first * 16 * (3 + D // 8) + (n // 16 + 1) * 16 + 2 * key


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


FORGED: dict[str, Callable[[bytes], tuple[int, bytes]]] = {  # native/kernels/cpu/cells.h
    "no cells": lambda _: (0, words(0)),
    "a cell less": lambda index: (0, words(number(index, 0) - 1)),
    "a cell more": lambda index: (0, words(number(index, 0) + 1)),
    "too many cells": lambda _: (0, words(N_CELLS_MOST + 1)),
    "very many cells": lambda _: (0, words((1 << 32) - 1)),
    "other keys": lambda _: (4, words(STRETCH - 1)),
    "first place": lambda index: (place(0), words(number(index, place(0)) + 256)),
    "a key more": lambda index: (place(0), words(number(index, place(0)) + 1)),
    "cells of no place": lambda _: (place(16), bytes(64)),
    "far place": lambda _: (place(7), words((1 << 32) - 1)),
    "last place": lambda index: (place(number(index, 0) - 1), words(number(index, place(number(index, 0) - 1)) | 255)),
    "chunk": lambda index: (chunk_of(index, 0, 0), struct.pack("<H", STRETCH // CHUNK)),
    "far chunk": lambda index: (chunk_of(index, number(index, 0) - 1, 0), struct.pack("<H", 65_535)),
}


def with_sums(data: bytes, layout: Layout) -> bytes:
    """The index's row of the table, and the table's checksum in both slots, to match."""
    size, chunk = layout.chunk_bytes[INDEX], STRETCH // CHUNK - 1
    for layer in range(layout.n_layer):
        value = checksum(data[layout.array(layer, INDEX) :][:size])
        row = struct.pack("<I", (value ^ value >> 32) & 0xFFFFFFFF)
        data = put(data, layout.table + 4 * ((chunk * layout.n_layer + layer) * N_ARRAYS + INDEX), row)
    for i in range(2):
        n_closed = struct.unpack_from("<q", data, layout.slot(i) + 24)[0]
        table = checksum(data[layout.table :][: 4 * N_ARRAYS * n_closed * layout.n_layer])
        data = put(data, layout.slot(i) + 32, struct.pack("<Q", table))
    return with_slots(data, 0, b"")


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_does_no_harm(model: LlamaModel, data: bytes, name: str, tmp_path: Path) -> None:
    """Breaks when numbers of an index with checksums to match lead a search out of its memory."""
    layout, path = layout_of(data), tmp_path / "a.akv"
    start = layout.array(1, INDEX)
    at, value = FORGED[name](data[start : start + layout.chunk_bytes[INDEX]])
    path.write_bytes(with_sums(put(data, start + at, value), layout))
    with opened(model, path) as session, pytest.raises(StateError, match="its index is inconsistent"):
        session.decode(ANSWER[:1], phase="decode")


def test_an_index_with_sums_to_match_is_taken(
    model: LlamaModel, expected: Callable[[int], Answer], data: bytes, tmp_path: Path
) -> None:
    """Breaks when the forgeries above are refused for the checksums that they were given."""
    path = tmp_path / "a.akv"
    path.write_bytes(with_sums(data, layout_of(data)))
    with opened(model, path) as session:
        check_same(answer(session), expected(LONGEST))


@dataclass
class Blob:
    """A state of LONGEST tokens, and the checksum of what lies before the last layer's index, which ends it."""

    data: bytes
    at: int
    before: int


@pytest.fixture(scope="module")
def blob(model: LlamaModel) -> Blob:
    with open_session(model) as session:
        read_to(session, LONGEST)
        found = bytes(session.state_get())[:-8]
    at = len(found) - STRETCH // CHUNK * index_bytes(CHUNK, n_head_kv=1, d_head=D)
    return Blob(found, at, mixed(len(found), found[: at - at % 8]))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_of_a_state_is_made_anew(
    model: LlamaModel, expected: Callable[[int], Answer], blob: Blob, name: str
) -> None:
    at, value = FORGED[name](blob.data[blob.at :])
    forged = put(blob.data, blob.at + at, value)
    assert forged != blob.data
    with open_session(model) as session:
        session.state_set(forged + struct.pack("<Q", mixed(blob.before, forged[blob.at - blob.at % 8 :])))
        check_same(answer(session), expected(LONGEST))
