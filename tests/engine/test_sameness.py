"""Breaks when a result depends on anything but the history: the tokens and how each was read (native/README.md).

However a session came to its history (rewinds, states, cancelled calls, any cut into calls), it continues exactly, bit
for bit, as a fresh session over the same history does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import engine_support
import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import N_VOCAB, Pieces, loaded, one_by_one, random_tokens, read, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray

from actqkv_cpp import Cancelled, Retrieval
from actqkv_cpp._native import Session
from actqkv_cpp.figures import Phase

METHODS: dict[str, Retrieval] = {
    "default": small(refine=2),
    "default exact": small(refine=2, positions="exact"),
    "many chunks": small(chunk=1, representatives=1, refine=2, budget=4 + 32 + 1),
    "by spreads alone": small(scan=0),
    "head": small(summary="head", score="cosine", refine=1),
    "question": small(summary="kv_head", score="cosine", refine=1, question_weight=4.0, positions="exact"),
    "published": small(method="published", probe_warmup=3),
    "dense": small(method="dense", positions="exact"),
    "quest": small(method="quest", positions=None, chunk=8, prefill="top", dense_layers=1),
    "oracle": small(method="oracle"),
    "q8_0": small(refine=3),
    "q4_0 exact": small(refine=3, positions="exact"),
    "q4_0 head": small(summary="head", score="cosine", refine=2),
}
KV_TYPES = {row: name[:4] for name, row in METHODS.items() if name[:4] in {"q8_0", "q4_0"}}  # the others: f16
PHASES: tuple[Phase, ...] = ("prefill", "decode", "question")
WINDOW = 16

# Windows full and unfinished, phases in every order, chunks closed in all of them; then what every comparison reads on.
HISTORY: Pieces = [
    (75, "prefill"),
    *one_by_one(6),
    (27, "question"),
    (30, "prefill"),
    *one_by_one(9),
    (13, "question"),
    *one_by_one(3),
    (21, "prefill"),
]
N_HISTORY = sum(n for n, _ in HISTORY)
TOKENS = random_tokens(N_HISTORY)
FURTHER: Pieces = [(19, "prefill"), *one_by_one(3), (7, "question"), (5, "prefill"), (1, "decode")]
FURTHER_TOKENS = random_tokens(sum(n for n, _ in FURTHER), seed=1)


def open_session(model: LlamaModel, retrieval: Retrieval, **options: Any) -> Session:
    return engine_support.open_session(model, retrieval, kv_type=KV_TYPES.get(retrieval, "f16"), **options)


@pytest.fixture(params=METHODS)
def retrieval(request: pytest.FixtureRequest) -> Retrieval:
    return METHODS[request.param]


@dataclass
class Trace:
    """What a continuation computed: logits, and every observed array by (n_past, layer, name)."""

    logits: NDArray[np.float32]
    arrays: dict[tuple[int, int, str], NDArray[np.float32]]


def go_on(session: Session) -> Trace:
    """Continue by FURTHER; windows that begin before it are not traced."""
    start = session.n_past
    arrays: dict[tuple[int, int, str], NDArray[np.float32]] = {}

    def observe(name: str, layer: int, n_past: int, data: NDArray[np.float32]) -> None:
        if n_past >= start:
            arrays[n_past, layer, name] = data

    session.observer = observe
    logits = read(session, FURTHER_TOKENS, FURTHER, n_logits=1)
    session.observer = None
    return Trace(logits, arrays)


def runs_of(phases: NDArray[np.int8]) -> Iterator[tuple[int, Phase]]:
    """A history as the fewest calls."""
    ends = [*(np.flatnonzero(np.diff(phases)) + 1).tolist(), len(phases)]
    for start, end in zip([0, *ends], ends, strict=False):
        if end > start:
            yield end - start, PHASES[int(phases[start])]


def fresh(session: Session, retrieval: Retrieval) -> Session:
    """A new session with the same history, read at once."""
    tokens, phases = session.history()
    other = open_session(session.model, retrieval)
    for n, phase in runs_of(phases):
        other.decode(tokens[other.n_past : other.n_past + n], phase=phase)
    return other


def check_same(session: Session, retrieval: Retrieval) -> None:
    """The session goes on as a fresh one does; its history is longer by FURTHER afterwards."""
    with fresh(session, retrieval) as other:
        found, expected = go_on(session), go_on(other)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array, err_msg=str(key))


@contextmanager
def session_with_history(model: LlamaModel, retrieval: Retrieval) -> Iterator[Session]:
    with open_session(model, retrieval) as session:
        read(session, TOKENS, HISTORY, n_logits=0)
        yield session


def replayed(session: Session, action: Callable[[], Any]) -> int:
    """Tokens that `action` had read again."""
    before = session.stats().n_replayed_tokens
    action()
    return session.stats().n_replayed_tokens - before


# ---- rewind


def test_rewind_to_any_token(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a rewound session remembers what it forgot, or forgets what it kept."""
    cuts = sorted({N_HISTORY, *range(0, N_HISTORY, 9), 16, 75, 76, 80, 81, 82, 96, 108, 138, 147}, reverse=True)
    with session_with_history(tiny_llama, retrieval) as session:
        for cut in cuts:
            session.rewind(cut)
            assert session.n_past == cut
            assert np.array_equal(session.history()[0], TOKENS[:cut])
            check_same(session, retrieval)


def test_rewinds_in_a_row(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a second rewind, or an extension, meets tokens that the first one left to be read again."""
    with session_with_history(tiny_llama, retrieval) as session:
        for cut in (150, 149, 101, 90):
            session.rewind(cut)
        session.decode(TOKENS[:3], phase="prefill")
        session.rewind(91)
        check_same(session, retrieval)


def test_rewind_after_a_partial_window_was_read_again(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when the second reading of an unfinished window adds to what the first one left."""
    for cut in (32, 35, 40, 48, 50):
        with open_session(tiny_llama, retrieval) as session:
            session.decode(TOKENS[:40])
            session.checkpoint()
            session.decode(TOKENS[40:70])
            session.rewind(cut)
            check_same(session, retrieval)


def test_checkpoint_reads_nothing_again(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a kept checkpoint is lost, or is not where it was asked for."""
    with open_session(tiny_llama, retrieval) as session:
        session.decode(TOKENS[:75])
        session.checkpoint()
        for _ in range(3):
            read(session, TOKENS[75:], [*one_by_one(4), (30, "question"), *one_by_one(4)], n_logits=0)
            assert replayed(session, lambda: session.rewind(75)) == 38
            assert replayed(session, lambda: session.decode(TOKENS[75:76], phase="decode")) == 0
            session.rewind(75)
        check_same(session, retrieval)


def test_a_kept_checkpoint_outlives_others(tiny_llama: LlamaModel) -> None:
    """Breaks when thinning drops what the caller asked to keep; a rewind behind it moves the wish to what is left."""
    for end, cut in ((80, 80), (75, 70)):  # 75: the window of 64 .. 75 is unfinished, so that 64 has a checkpoint too
        with open_session(tiny_llama, METHODS["default"]) as session:
            session.decode(TOKENS[:end])
            session.checkpoint()
            session.rewind(cut)
            for turn in range(14):
                session.decode(random_tokens(11, seed=turn), phase="question")
                session.decode(random_tokens(3, seed=turn), phase="decode")
            start = 80 if cut == 80 else 64
            n_done = session.n_past
            assert replayed(session, lambda: session.rewind(start)) == n_done - start  # noqa: B023
            assert replayed(session, lambda: session.decode(TOKENS[:1], phase="decode")) == 0


def test_checkpoint_of_pending_tokens(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a checkpoint in front of tokens still to be read is taken for one behind them."""
    with session_with_history(tiny_llama, retrieval) as session:
        session.rewind(100)
        session.checkpoint()
        session.decode(TOKENS[100:130])
        session.rewind(100)
        check_same(session, retrieval)


def test_many_turns(tiny_llama: LlamaModel) -> None:
    """Breaks when thinning drops the checkpoint of a turn in use, or keeps one that was overwritten."""
    retrieval = METHODS["default"]
    ends = []
    with open_session(tiny_llama, retrieval) as session:
        for turn in range(24):
            session.decode(random_tokens(11 + turn % 5, seed=turn), phase="question")
            session.decode(random_tokens(5, seed=turn), phase="decode")
            if turn % 3 == 0:
                session.checkpoint()
            ends.append(session.n_past)
        assert replayed(session, lambda: session.rewind(ends[-1])) == 0
        for end in ends[::-3]:
            session.rewind(end)
            check_same(session, retrieval)
            session.rewind(end)


def test_long_history_keeps_few_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Breaks when rewinding in a long document reads all of it again, or checkpoints grow with it."""
    path = tiny.make_tiny_gguf(
        tmp_path_factory.mktemp("long") / "model.gguf", n_layer=1, n_embd=32, n_head=2, n_head_kv=1
    )
    n_tokens, window = 60_000, 256
    retrieval = small(n_local=window, window=window, chunk=64, budget=4 + window + 2 * 64)
    with loaded(path) as model, open_session(model, retrieval, n_ctx=n_tokens + 1000) as session:
        tokens = np.tile(random_tokens(6000), 10)
        session.decode(tokens)
        # 14 checkpoints were due, 4096 tokens apart; 8 stay. A token and its phase take 5 bytes.
        without_kv = len(session.state_get()) - session.plan.kv_bytes - 5 * n_tokens
        assert without_kv < session.plan.checkpoint_bytes + session.plan.summary_bytes
        assert replayed(session, lambda: session.rewind(n_tokens - 1)) < 2 * 4096
        session.rewind(30_001)
        expected = session.decode(tokens[:5], phase="decode", n_logits=1)
        assert session.stats().n_replayed_tokens < n_tokens
        with open_session(model, retrieval, n_ctx=n_tokens + 1000) as other:
            other.decode(tokens[:30_001])
            np.testing.assert_array_equal(other.decode(tokens[:5], phase="decode", n_logits=1), expected)


# ---- cutting into calls


@pytest.mark.parametrize("seed", range(3))
def test_any_cut_into_calls(seed: int, tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a text read in pieces is not the text read at once."""
    rng = np.random.default_rng(seed)
    with open_session(tiny_llama, retrieval) as session:
        for n, phase in HISTORY:
            left = n
            while left > 0:
                part = int(rng.integers(0, min(left, 1 if rng.random() < 0.3 else 40) + 1))
                session.decode(TOKENS[session.n_past : session.n_past + part], phase=phase)
                left -= part
        assert np.array_equal(session.history()[0], TOKENS)
        check_same(session, retrieval)


def test_answers_in_one_call(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when decode tokens of one call are not windows of one token each."""
    rows = []
    ways: list[Pieces] = [[(90, "prefill"), (8, "decode")], [(90, "prefill"), *one_by_one(8)]]
    for pieces in ways:
        with open_session(tiny_llama, retrieval) as session:
            rows.append(read(session, TOKENS, pieces, n_logits=8)[-8:])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_other_phases_differ(tiny_llama: LlamaModel) -> None:
    """Breaks when the phase is no part of the history: decode tokens update no statistics, and are planned singly."""
    last: list[NDArray[np.float32]] = []
    ways: list[Pieces] = [[(150, "prefill")], [(120, "prefill"), *one_by_one(30)]]
    for pieces in ways:
        with open_session(tiny_llama, METHODS["default"]) as session:
            read(session, TOKENS, pieces, n_logits=0)
            last.append(session.decode(TOKENS[:1], phase="decode", n_logits=1))
    assert not np.array_equal(last[0], last[1])


# ---- state


def copy_of(session: Session, retrieval: Retrieval, **options: Any) -> Session:
    other = open_session(session.model, retrieval, **options)
    other.state_set(session.state_get())
    return other


def test_state_in_a_new_session(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when something that a session has learnt is not in its state."""
    with session_with_history(tiny_llama, retrieval) as session, copy_of(session, retrieval) as other:
        assert other.state_get() == session.state_get()
        assert (other.n_past, other.n_chunks) == (session.n_past, session.n_chunks)
        check_same(other, retrieval)
        check_same(session, retrieval)  # getting a state changes nothing
        other.rewind(60)  # its checkpoints came with it
        check_same(other, retrieval)


def test_state_at_any_point(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a state of an unfinished window, of pending tokens or of nothing at all does not continue."""
    with session_with_history(tiny_llama, retrieval) as session:
        for cut in (N_HISTORY - 1, 120, 100, 77, 75, 20, 3, 0):
            session.rewind(cut)
            with copy_of(session, retrieval) as other:
                assert other.n_past == cut
                check_same(other, retrieval)


def test_state_in_another_n_ctx(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a state only fits a session of the same n_ctx; positions "auto" follow n_ctx, these do not."""
    for n_ctx in (N_HISTORY + 60, 2048):
        with session_with_history(tiny_llama, retrieval) as session:
            session.rewind(N_HISTORY - 50)
            with copy_of(session, retrieval, n_ctx=n_ctx) as other:
                check_same(other, retrieval)


def test_state_replaces_another_history(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when something of the session's earlier history shines through a state."""
    with session_with_history(tiny_llama, retrieval) as session, open_session(tiny_llama, retrieval) as other:
        session.rewind(90)
        other.decode(random_tokens(200, seed=5))
        other.checkpoint()
        other.state_set(session.state_get())
        check_same(other, retrieval)
        other.rewind(40)
        check_same(other, retrieval)


# ---- cancelling


def stop_after(session: Session, n_windows: int) -> None:
    """Let the next call stop when so many windows are done."""
    calls = iter(range(n_windows - 1))
    session.progress = lambda done, total: next(calls, None) is not None


@pytest.mark.parametrize("n_windows", [1, 2, 5])
def test_cancelled_reading_keeps_its_windows(n_windows: int, tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when a cancelled call keeps half a window, or loses a whole one."""
    with open_session(tiny_llama, retrieval) as session:
        session.decode(TOKENS[:40])
        stop_after(session, n_windows)
        with pytest.raises(Cancelled):
            session.decode(TOKENS[40:170])
        session.progress = None
        assert session.n_past == 32 + n_windows * WINDOW  # the window of 32 .. 40 was read again
        assert np.array_equal(session.history()[0], TOKENS[: session.n_past])
        check_same(session, retrieval)


def test_cancelled_while_reading_again(tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when cancelling among tokens that a rewind left to be read again loses them."""
    with session_with_history(tiny_llama, retrieval) as session:
        session.rewind(90)
        stop_after(session, 1)
        with pytest.raises(Cancelled):
            session.decode(TOKENS[90:120])
        session.progress = None
        assert session.n_past in range(90, 97)
        assert np.array_equal(session.history()[0], TOKENS[: session.n_past])
        check_same(session, retrieval)


@pytest.mark.parametrize("callback", ["progress", "observer"])
def test_raising_callbacks(callback: str, tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when an exception in a callback is lost, or costs more than the call's open window."""

    def fail(*_: Any) -> bool:
        raise KeyboardInterrupt

    with open_session(tiny_llama, retrieval) as session:
        session.decode(TOKENS[:40])
        setattr(session, callback, fail)
        with pytest.raises(KeyboardInterrupt):
            session.decode(TOKENS[40:170])
        setattr(session, callback, None)
        assert session.n_past == 32 + WINDOW
        check_same(session, retrieval)


def test_progress_counts_tokens(tiny_llama: LlamaModel) -> None:
    """Breaks when progress does not grow to its total, window by window."""
    seen: list[tuple[int, int]] = []
    with open_session(tiny_llama, METHODS["default"]) as session:
        session.progress = lambda done, total: seen.append((done, total))
        session.decode(TOKENS[:40])
    assert seen == [(16, 40), (32, 40), (40, 40)]


# ---- everything at once


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence(seed: int, tiny_llama: LlamaModel, retrieval: Retrieval) -> None:
    """Breaks when some order of calls leaves a session that is not its history."""
    rng = np.random.default_rng(seed)
    session = open_session(tiny_llama, retrieval)
    log: list[str] = []
    for _ in range(30):
        room = 400 - session.n_past
        action = rng.choice(["read", "read", "answer", "rewind", "checkpoint", "state", "cancel"])
        n = int(rng.integers(0, max(1, min(room, 60))))
        log.append(f"{action} {n} at {session.n_past}")
        if action in ("read", "cancel"):
            if action == "cancel":
                stop_after(session, int(rng.integers(1, 4)))
            phase: Phase = "question" if rng.random() < 0.3 else "prefill"
            with suppress(Cancelled):
                session.decode(rng.integers(3, N_VOCAB, n), phase=phase)
            session.progress = None
        elif action == "answer":
            session.decode(rng.integers(3, N_VOCAB, n % 7), phase="decode")
        elif action == "rewind":
            session.rewind(max(0, session.n_past - int(rng.integers(0, 80))))
        elif action == "checkpoint":
            session.checkpoint()
        else:
            other = copy_of(session, retrieval)
            session.close()
            session = other
    print("\n".join(log))
    check_same(session, retrieval)
    session.close()
