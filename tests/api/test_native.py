"""Breaks when a native session loses its rules: one thread at a time, clean cancelling, no use after close."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_gguf import make_gemma_gguf

from actqkv_cpp import Cancelled, ContextError, Llama, ModelError, ParameterError, Retrieval, StateError, ThreadError
from actqkv_cpp._native import Session, ffi, methods
from actqkv_cpp.figures import MemoryPlan, Stats

SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=128)
TOKENS = np.random.default_rng(0).integers(3, 500, 400).astype(np.int32)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[object]:
    llm = Llama(tiny_model, verbose=False, n_threads=1)
    yield llm._model
    llm.close()


@pytest.fixture
def session(model: object) -> Iterator[Session]:
    with Session(model, SMALL, n_ctx=512, n_threads=1) as found:
        yield found


def test_decode(session: Session) -> None:
    """Breaks when tokens, phases or logits do not arrive as they were given."""
    rows = session.decode(TOKENS[:40], n_logits=3)
    assert rows.shape == (3, session.n_vocab)
    assert np.isfinite(rows).all()
    last = session.decode(TOKENS[40:41], phase="decode", n_logits=1)
    assert last.shape == (1, session.n_vocab)
    tokens, phases = session.history()
    assert tokens.tolist() == TOKENS[:41].tolist()
    assert phases.tolist() == [0] * 40 + [1]
    assert session.n_past == 41


def test_rewind_equals_a_fresh_run(session: Session, model: object) -> None:
    """Breaks when a rewound session remembers what it forgot."""
    session.decode(TOKENS)
    session.rewind(200)
    again = session.decode(TOKENS[200:230], n_logits=1)
    with Session(model, SMALL, n_ctx=512, n_threads=1) as fresh:
        assert np.array_equal(fresh.decode(TOKENS[:230], n_logits=1), again)


def test_state(session: Session, model: object) -> None:
    """Breaks when a saved session does not continue as it would have."""
    session.decode(TOKENS[:300])
    blob = session.state_get()
    expected = session.decode(TOKENS[300:301], phase="decode", n_logits=1)
    with Session(model, SMALL, n_ctx=512, n_threads=1) as other:
        other.state_set(blob)
        assert np.array_equal(other.decode(TOKENS[300:301], phase="decode", n_logits=1), expected)
        for damaged in (b"", bytes(blob[:-1]), bytes(blob[: len(blob) // 2]), bytes(100)):
            with pytest.raises(StateError):
                other.state_set(damaged)


def test_context_full(session: Session) -> None:
    """Breaks when tokens beyond n_ctx are cut, or half of them are read."""
    session.decode(TOKENS)
    with pytest.raises(ContextError, match="512"):
        session.decode(TOKENS)
    assert session.n_past == len(TOKENS)


@pytest.mark.parametrize("tokens", [[-1], [1 << 20]])
def test_token_outside_the_vocabulary(session: Session, tokens: list[int]) -> None:
    """Breaks when a wrong token reads foreign memory."""
    with pytest.raises(ParameterError):
        session.decode(tokens)


def test_wrong_number_of_logits(session: Session) -> None:
    """Breaks when more rows are asked for than tokens are read."""
    with pytest.raises(ParameterError):
        session.decode(TOKENS[:4], n_logits=5)


@pytest.mark.parametrize(
    ("retrieval", "n_ctx", "match"),
    [
        (Retrieval(budget=600), 512, "budget"),
        (Retrieval(window=1024), 512, "window"),
        (Retrieval(chunk=0), 512, "chunk"),
        (Retrieval(n_sink=1 << 40), 512, "n_sink"),
        (Retrieval(), -1, "n_ctx"),
        (Retrieval(cutoff_temperature=0.0), 512, "temperature"),
    ],
)
def test_contradicting_parameters(model: object, retrieval: Retrieval, n_ctx: int, match: str) -> None:
    """Breaks when values that contradict each other make a session."""
    with pytest.raises(ParameterError, match=match):
        Session(model, retrieval, n_ctx=n_ctx, n_threads=1)


def test_unknown_method_names_the_near_one(model: object) -> None:
    """Breaks when a misspelt method is an unexplained error."""
    with pytest.raises(ParameterError, match="actqv") as caught:
        Session(model, Retrieval("actqv"), n_ctx=512, n_threads=1)
    assert "actqkv" in (caught.value.hint or "")


def test_parameters_in_force(model: object) -> None:
    """Breaks when a column of Retrieval does not reach the session."""
    changed = Retrieval("dense", positions="clamped", score="dot", representatives=2, n_local=96, window=48)
    with Session(model, changed, n_ctx=777, n_threads=1) as session:
        params = session.params
    assert (params.method, params.n_ctx, params.n_local, params.n_window) == ("dense", 777, 96, 48)
    assert params.columns == methods()["dense"] | {"positions": "clamped", "score": "dot", "representatives": 2}


def test_progress(session: Session) -> None:
    """Breaks when progress does not reach the total, or counts backwards."""
    seen: list[tuple[int, int]] = []
    session.progress = lambda done, total: seen.append((done, total))
    session.decode(TOKENS)
    assert seen == sorted(seen)
    assert seen[-1] == (len(TOKENS), len(TOKENS))
    assert len(seen) >= len(TOKENS) // 32


def test_progress_stops(session: Session) -> None:
    """Breaks when a reading cannot be cancelled, or cancelling loses the windows before."""
    session.progress = lambda done, total: done < 100
    with pytest.raises(Cancelled):
        session.decode(TOKENS)
    kept = session.n_past
    assert 100 <= kept < len(TOKENS)
    session.progress = None
    session.decode(TOKENS[kept:])
    assert session.history()[0].tolist() == TOKENS.tolist()


def test_exception_in_progress(session: Session) -> None:
    """Breaks when an exception in a callback is printed and forgotten instead of raised."""

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError("in progress")

    session.progress = fail
    with pytest.raises(ZeroDivisionError, match="in progress"):
        session.decode(TOKENS)
    assert 0 < session.n_past < len(TOKENS)


def test_interrupt(session: Session) -> None:
    """Breaks when Ctrl-C does not stop a reading at a window, or loses what was read."""
    timer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT))

    def start(done: int, total: int) -> None:
        if not timer.is_alive():
            timer.start()
            timer.join()

    session.progress = start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start without it
    try:
        with pytest.raises(KeyboardInterrupt):
            session.decode(TOKENS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < session.n_past < len(TOKENS)
    session.progress = None
    session.decode(TOKENS[session.n_past :])


def test_observer(session: Session) -> None:
    """Breaks when observed arrays have the wrong shape, or outlive the call as garbage."""
    seen: dict[str, NDArray[np.float32]] = {}
    session.observer = lambda name, layer, n_past, array: seen.setdefault(name, array)  # type: ignore[func-returns-value]
    session.decode(TOKENS[:32])
    session.observer = None
    assert seen["q"].shape == (32, 4, 32)
    assert seen["k"].shape == (32, 2, 32)
    assert all(np.isfinite(array).all() for array in seen.values())


def test_exception_in_observer(session: Session) -> None:
    """Breaks when an exception in the observer is lost."""

    def fail(name: str, layer: int, n_past: int, array: NDArray[np.float32]) -> None:
        raise ZeroDivisionError(name)

    session.observer = fail
    with pytest.raises(ZeroDivisionError):
        session.decode(TOKENS)


def test_second_thread(session: Session) -> None:
    """Breaks when two threads can be in one session, or the error does not name them."""
    raised: list[BaseException] = []

    def other() -> None:
        for call in (lambda: session.decode(TOKENS[:1]), lambda: session.n_past, session.close):
            try:
                call()
            except ThreadError as error:
                raised.append(error)

    def during(done: int, total: int) -> None:
        thread = threading.Thread(target=other, name="intruder")
        thread.start()
        thread.join()

    session.progress = during
    session.decode(TOKENS[:20])
    assert len(raised) == 3
    assert "intruder" in str(raised[0])
    assert threading.current_thread().name in str(raised[0])
    assert session.n_past == 20


def test_callback_may_look_but_not_touch(session: Session) -> None:
    """Breaks when a callback re-enters the call it came from, or cannot even ask how far it is."""
    seen: list[int] = []

    def during(done: int, total: int) -> None:
        seen.append(session.n_past)
        session.rewind(0)

    session.progress = during
    with pytest.raises(ThreadError):
        session.decode(TOKENS)
    assert seen


def test_closed(session: Session) -> None:
    """Breaks when a closed session reaches freed memory."""
    session.close()
    session.close()
    for call in (lambda: session.decode([1]), lambda: session.n_past, session.state_get, lambda: session.params):
        with pytest.raises(StateError, match="closed"):
            call()


def test_session_keeps_its_model(tiny_model: Path) -> None:
    """Breaks when freeing the model first leaves a session that points into it."""
    llm = Llama(tiny_model, verbose=False, n_threads=1)
    session = Session(llm._model, SMALL, n_ctx=512, n_threads=1)
    llm.close()
    assert session.closed
    with pytest.raises(StateError):
        Session(llm._model, SMALL, n_ctx=512, n_threads=1)
    del llm, session
    gc.collect()


def test_sources(session: Session) -> None:
    """Breaks when the sums that the library gives are cut off, or not one for each token of the past."""
    session.decode(TOKENS)
    session.sources_begin()
    for token in TOKENS[:5]:
        session.decode([token], phase="decode")
    weights = session.sources_end()
    assert len(weights) == len(TOKENS) + 4
    assert 0 < weights.sum() < 5


def test_stats(session: Session) -> None:
    """Breaks when the counters do not count, or a reset leaves something."""
    session.decode(TOKENS)
    stats = session.stats()
    assert stats.n_prefill_tokens == len(TOKENS)
    assert stats.attended_tokens_max >= SMALL.budget  # type: ignore[operator]
    session.stats_reset()
    assert session.stats().n_prefill_tokens == 0


@pytest.mark.parametrize(("kind", "struct"), [(Stats, "actqkv_stats"), (MemoryPlan, "actqkv_memory")])
def test_structs(kind: type[object], struct: str) -> None:
    """Breaks when a field of the library's struct has no place in Python."""
    found = [name for name, _ in ffi.typeof(f"struct {struct}").fields]
    assert found == [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]


def test_model_of_another_architecture(tmp_path: Path) -> None:
    """Breaks when our graph runs a model it does not know."""
    with pytest.warns(UserWarning, match="llama.cpp"):
        llm = Llama(make_gemma_gguf(tmp_path / "gemma.gguf"), verbose=False)
    with pytest.raises(ModelError):
        Session(llm._model, SMALL, n_ctx=512, n_threads=1)
    llm.close()


@pytest.mark.parametrize("token", [2**32 + 5, -(2**31) - 1, 5.5])
def test_tokens_do_not_wrap(session: Session, token: float) -> None:
    """Breaks when a number that is no token is read as another one."""
    with pytest.raises(ParameterError, match="32 bits"):
        session.decode([token])
    assert session.n_past == 0
