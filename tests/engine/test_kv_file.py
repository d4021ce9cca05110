"""Breaks when a session that was opened from a KV file, or resumed into one, is not the session that was written.

What is compared is the continuation, bit for bit, as in test_sameness.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import Pieces, loaded, random_tokens, read, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray
from test_sameness import HISTORY, METHODS, N_HISTORY, TOKENS, WINDOW, check_same, go_on, open_session

from actqkv_cpp import Cancelled, ContextError, KVFileError, ParameterError, Retrieval, StateError, kvfile
from actqkv_cpp._native import Session

SECTION = "text, Grüße".encode()
CHECKPOINT = 2 * WINDOW
NUMBERS = {"prefill": 0, "decode": 1, "question": 2}


@pytest.fixture(params=METHODS)
def retrieval(request: pytest.FixtureRequest) -> Retrieval:
    return METHODS[request.param]


def phases_of(pieces: Pieces) -> NDArray[np.int8]:
    return np.concatenate([np.full(n, NUMBERS[phase], np.int8) for n, phase in pieces])


def begin(session: Session, path: Path, *, pieces: Pieces = HISTORY, tokens: NDArray[np.int32] = TOKENS) -> None:
    kvfile.begin(session, path, tokens, phases_of(pieces), SECTION, checkpoint_tokens=CHECKPOINT)


def opened(model: LlamaModel, path: Path, *, n_ctx: int = 1024, write: bool = False) -> Session:
    return kvfile.open_session(model, path, n_ctx=n_ctx, n_threads=1, write=write)


def written(model: LlamaModel, retrieval: Retrieval, path: Path) -> Path:
    """The file of HISTORY, written while it is read."""
    with open_session(model, retrieval) as session:
        begin(session, path)
        read(session, TOKENS, HISTORY, n_logits=0)
        kvfile.end(session)
    return path


def test_opened_goes_on_as_a_fresh_reading(tiny_llama: LlamaModel, retrieval: Retrieval, tmp_path: Path) -> None:
    """Breaks when something that a result depends on is not in the file; also after the file was answered from."""
    path = written(tiny_llama, retrieval, tmp_path / "a.akv")
    with opened(tiny_llama, path) as session:
        np.testing.assert_array_equal(session.history()[0], TOKENS)
        np.testing.assert_array_equal(session.history()[1], phases_of(HISTORY))
        check_same(session, retrieval)
        session.rewind(N_HISTORY)
        check_same(session, retrieval)
        session.rewind(50)  # to before what the file can give back
        check_same(session, retrieval)
    kvfile.verify(path)


def test_writing_changes_nothing(tiny_llama: LlamaModel, retrieval: Retrieval, tmp_path: Path) -> None:
    """Breaks when a session that writes its reading, or wrote it, gives other results."""
    with open_session(tiny_llama, retrieval) as session:
        begin(session, tmp_path / "a.akv")
        read(session, TOKENS, HISTORY, n_logits=0)
        kvfile.sync(session)
        kvfile.end(session)
        check_same(session, retrieval)


def test_spilled(tiny_llama: LlamaModel, retrieval: Retrieval, tmp_path: Path) -> None:
    """Breaks when chunks that left memory for the file are not what they were, or do not leave it."""
    path = tmp_path / "a.akv"
    tokens = np.concatenate([random_tokens(500, seed=3), TOKENS])
    pieces: Pieces = [(500, "prefill"), *HISTORY]
    with open_session(tiny_llama, retrieval) as session:
        begin(session, path, pieces=pieces, tokens=tokens)
        kvfile.spill(session)
        read(session, tokens, pieces, n_logits=0)
        assert str(path) in Path("/proc/self/maps").read_text()
        kvfile.end(session)
        check_same(session, retrieval)
        session.rewind(300)
        check_same(session, retrieval)
    kvfile.verify(path)


def test_spilled_from_the_middle_on(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when chunks that were written before chunks left memory are lost with them, or a second file's."""
    retrieval, n = small(), 8 * 512  # chunks of it are whole pages
    tokens = random_tokens(n)
    pieces: Pieces = [(n, "prefill")]
    with open_session(tiny_llama, retrieval, n_ctx=n + 100) as plain:
        plain.decode(tokens)
        expected = plain.decode(TOKENS[:1], phase="decode", n_logits=1)
        plain.rewind(n)
        with open_session(tiny_llama, retrieval, n_ctx=n + 100) as session:
            begin(session, tmp_path / "a.akv", pieces=pieces, tokens=tokens)
            session.decode(tokens[: n // 2])
            kvfile.spill(session)
            session.decode(tokens[n // 2 :])
            kvfile.end(session)
            np.testing.assert_array_equal(session.decode(TOKENS[:1], phase="decode", n_logits=1), expected)
            session.rewind(n)
            begin(session, tmp_path / "b.akv", pieces=pieces, tokens=tokens)
            kvfile.spill(session)
            kvfile.end(session)
            (tmp_path / "a.akv").unlink()
            np.testing.assert_array_equal(session.decode(TOKENS[:1], phase="decode", n_logits=1), expected)
    kvfile.verify(tmp_path / "b.akv")


def test_saved_afterwards(tiny_llama: LlamaModel, retrieval: Retrieval, tmp_path: Path) -> None:
    """Breaks when a file that is begun after the reading differs, or a question asked before it leaves a trace."""
    with open_session(tiny_llama, retrieval) as session:
        read(session, TOKENS, HISTORY, n_logits=0)
        go_on(session)
        session.rewind(N_HISTORY)
        begin(session, tmp_path / "a.akv")
        kvfile.end(session)
        check_same(session, retrieval)
    with opened(tiny_llama, tmp_path / "a.akv") as session:
        check_same(session, retrieval)


def test_resumed(tiny_llama: LlamaModel, retrieval: Retrieval, tmp_path: Path) -> None:
    """Breaks when a reading that was stopped at any point and read on differs from one at a stretch."""
    path = tmp_path / "a.akv"
    with open_session(tiny_llama, retrieval) as session:
        begin(session, path)
        session.decode(TOKENS[:41])
        kvfile.sync(session)
        assert kvfile.info(path).n_done == 32  # where the unfinished window starts
    for n in (70, 75, 79, 150, N_HISTORY):
        with opened(tiny_llama, path, write=True) as session:
            assert session.n_past == kvfile.info(path).n_done
            read_on(session, n)
            if n < N_HISTORY:
                kvfile.sync(session)
            else:
                kvfile.end(session)
            check_same(session, retrieval) if n == N_HISTORY else None
    with opened(tiny_llama, path) as session:
        check_same(session, retrieval)


def read_on(session: Session, n: int) -> None:
    """Read HISTORY up to its n-th token."""
    at = 0
    for length, phase in HISTORY:
        first, last = max(at, session.n_past), min(at + length, n)
        if first < last:
            session.decode(TOKENS[first:last], phase=phase)
        at += length


def test_what_a_file_tells(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when a file says something else than what was put into it."""
    path = written(tiny_llama, METHODS["default"], tmp_path / "a.akv")
    info = kvfile.info(path)
    assert (info.n_tokens, info.complete, info.version) == (N_HISTORY, True, 3)
    assert info.n_done % WINDOW == 0
    assert N_HISTORY - info.n_done < WINDOW
    assert info.file_bytes == path.stat().st_size
    tokens, phases, section = kvfile.read(path)
    np.testing.assert_array_equal(tokens, TOKENS)
    np.testing.assert_array_equal(phases, phases_of(HISTORY))
    assert section == SECTION
    with opened(tiny_llama, path) as session:
        assert session.n_chunks == info.n_chunks
        assert session.params.columns == info.params.columns


def test_other_sizes(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when n_ctx has to be the reading's, or one that is too small is found out late."""
    path = written(tiny_llama, METHODS["default"], tmp_path / "a.akv")
    with opened(tiny_llama, path, n_ctx=N_HISTORY + 60) as one, opened(tiny_llama, path, n_ctx=4096) as other:
        np.testing.assert_array_equal(go_on(one).logits, go_on(other).logits)
    with pytest.raises(ContextError, match=rf"holds {N_HISTORY} tokens, n_ctx is {N_HISTORY - 1}"):
        opened(tiny_llama, path, n_ctx=N_HISTORY - 1)


def test_answered_by_another_method(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when an opened reading cannot be answered by what a fresh one can, or by what it cannot."""
    path = written(tiny_llama, small(refine=2), tmp_path / "a.akv")
    with opened(tiny_llama, path) as session, open_session(tiny_llama, small(refine=2)) as other:
        read(other, TOKENS, HISTORY, n_logits=0)
        wider = small(refine=4, budget=4 + 32 + 9 * 8)
        session.set_answering(wider)
        other.set_answering(wider)
        np.testing.assert_array_equal(go_on(session).logits, go_on(other).logits)
        with pytest.raises(ParameterError, match="summary is 'mean', the reading's 'spread'"):
            session.set_answering(small(summary="mean"))


def test_chunks_are_shared_and_never_written(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when answering changes the file, or an opened file is copied into memory."""
    path = written(tiny_llama, METHODS["default"], tmp_path / "a.akv")
    before = path.read_bytes()
    path.chmod(0o444)
    with opened(tiny_llama, path) as one, opened(tiny_llama, path) as other:
        assert str(path) in Path("/proc/self/maps").read_text()
        np.testing.assert_array_equal(go_on(one).logits, go_on(other).logits)
        one.rewind(0)
        one.decode(random_tokens(N_HISTORY, seed=9))
        other.rewind(N_HISTORY)
        check_same(other, METHODS["default"])
    assert path.read_bytes() == before


def test_cancelled_reading(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when a reading that is stopped by its progress function cannot be read on from there."""
    path, tokens = tmp_path / "a.akv", random_tokens(400)
    pieces: Pieces = [(400, "prefill")]
    with open_session(tiny_llama, small()) as session:
        begin(session, path, pieces=pieces, tokens=tokens)
        session.progress = lambda done, _: done < 200
        with pytest.raises(Cancelled):
            session.decode(tokens)
        kvfile.sync(session)
        assert kvfile.info(path).n_done == session.n_past == 208
    with opened(tiny_llama, path, write=True) as session:
        session.decode(tokens[208:])
        kvfile.end(session)
        check_same(session, small())


# wrong use


def test_another_reading(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when other tokens than the planned ones get into a file."""
    with open_session(tiny_llama, small()) as session:
        begin(session, tmp_path / "a.akv")
        with pytest.raises(ParameterError, match="other tokens than its KV file"):
            session.decode(random_tokens(N_HISTORY, seed=5))
        assert session.n_past == 0
        assert kvfile.info(tmp_path / "a.akv").n_done == 0
        with pytest.raises(ParameterError, match="writes a KV file already"):
            begin(session, tmp_path / "b.akv")
        session.decode(TOKENS[:75])
        with pytest.raises(ParameterError, match=rf"75 of the reading's {N_HISTORY} tokens"):
            kvfile.end(session)
    with open_session(tiny_llama, small()) as session:
        for action in (kvfile.sync, kvfile.end, kvfile.spill):
            with pytest.raises(ParameterError, match="writes no KV file"):
                action(session)
        bad = TOKENS.copy()
        bad[3] = -1
        with pytest.raises(ParameterError, match="token 3 is -1"):
            begin(session, tmp_path / "c.akv", tokens=bad)
        with pytest.raises(ParameterError, match="checkpoint_tokens is 0"):
            kvfile.begin(session, tmp_path / "c.akv", TOKENS, phases_of(HISTORY), b"", checkpoint_tokens=0)
        long = np.zeros(2000, np.int32)
        with pytest.raises(ContextError, match="do not fit n_ctx"):
            kvfile.begin(session, tmp_path / "c.akv", long, np.zeros(2000), b"", checkpoint_tokens=64)
        with pytest.raises(ParameterError, match="NUL"):
            begin(session, Path("a\0b"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.akv"]


def test_names_that_cannot_be(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when what the system refuses is not said by name and reason, or a file is overwritten."""
    path = written(tiny_llama, METHODS["default"], tmp_path / "a.akv")
    with open_session(tiny_llama, small()) as session:
        for name, reason in (
            ("a.akv", "exists already"),
            ("none/a.akv", "No such file"),
            ("a.akv/b.akv", "Not a directory"),
        ):
            with pytest.raises(KVFileError, match=reason) as caught:
                begin(session, tmp_path / name)
            assert name in str(caught.value)
        (tmp_path / "b.akv.tmp").write_text("not ours")
        with pytest.raises(KVFileError, match=r"b\.akv\.tmp is in the way"):
            begin(session, tmp_path / "b.akv")
        assert (tmp_path / "b.akv.tmp").read_text() == "not ours"
        (tmp_path / "c.akv.tmp").hardlink_to(path)  # as a kill between link and unlink leaves it
        begin(session, tmp_path / "c.akv")
    for name, kind in (("none.akv", KVFileError), (".", StateError)):
        with pytest.raises(kind):
            opened(tiny_llama, tmp_path / name)
        with pytest.raises(kind):
            kvfile.info(tmp_path / name)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StateError, match="not a KV file"):
        kvfile.info(tmp_path / "fifo")
    assert kvfile.info(path).complete


def test_one_writer(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when two processes write one file."""
    path = tmp_path / "a.akv"
    with open_session(tiny_llama, small()) as session:
        begin(session, path)
        with pytest.raises(KVFileError, match="another process"):
            opened(tiny_llama, path, write=True)
        with opened(tiny_llama, path) as reader:  # which sees what is there
            assert reader.n_past == 0
    with opened(tiny_llama, path, write=True) as session:
        assert session.n_past == 0


def test_read_only_folder(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when a folder that cannot be written to is found out late, or by another error."""
    if os.geteuid() == 0:
        folder = Path("/proc/self")  # where root may not write either
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
    with open_session(tiny_llama, small()) as session, pytest.raises(KVFileError, match="cannot make"):
        begin(session, folder / "a.akv")


# a process that dies, and a disk that is full


def forked(work: object) -> int:
    """Runs `work` in a child process; its process id. The model must not have computed with threads before."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with contextlib.suppress(BaseException):
        work()  # type: ignore[operator]
        status = 0
    os._exit(status)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Breaks when a process that is killed while it writes leaves a file that does not open, or goes on differently."""
    model_path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    tokens, retrieval = random_tokens(900), METHODS["default"]
    pieces: Pieces = [(900, "prefill")]
    chance = random.Random(0)
    with loaded(model_path) as model, open_session(model, retrieval) as session:
        session.decode(tokens)
        expected = go_on(session)
        seconds = session.stats().prefill_ms / 1000

    def work(path: Path, last: int) -> None:
        """Read on, and die in the middle of the window behind token `last`."""
        with loaded(model_path) as model:
            if path.exists():
                session = opened(model, path, write=True)
            else:
                session = open_session(model, retrieval)
                begin(session, path, pieces=pieces, tokens=tokens)
            session.progress = lambda _, __: session.n_past < last or os.kill(os.getpid(), signal.SIGKILL)
            for at in range(session.n_past, 900, 100):
                session.decode(tokens[at : at + 100])
            kvfile.end(session)

    unfinished = 0
    for i in range(20):
        path = tmp_path / f"{i}.akv"
        last = chance.randrange(100, 800) if i % 2 else 1000
        pid = forked(lambda path=path, last=last: work(path, last))
        if i % 2 == 0:
            time.sleep(chance.uniform(0.1, 1.0) * seconds)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        unfinished += path.exists() and 0 < kvfile.info(path).n_done < 900 - WINDOW
        _, status = os.waitpid(forked(lambda path=path: work(path, 1000)), 0)
        assert status == 0
        kvfile.verify(path)
        with loaded(model_path) as model, opened(model, path) as session:
            found = go_on(session)
        np.testing.assert_array_equal(found.logits, expected.logits)
        for key, array in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[key], array, err_msg=str(key))
        path.unlink()
    assert unfinished >= 8


def test_disk_full(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when a full disk kills the process, ruins what was written, or leaves the session in between."""
    path, tokens = tmp_path / "a.akv", random_tokens(900)
    pieces: Pieces = [(900, "prefill")]
    with open_session(tiny_llama, small()) as session:
        begin(session, path, pieces=pieces, tokens=tokens)
        session.decode(tokens[:480])
        kvfile.sync(session)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 8, before[1]))
        try:
            with pytest.raises(KVFileError, match=r"cannot write to .*a\.akv: File too large"):
                session.decode(tokens[480:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, signal_before)
        assert session.n_past == 480
        assert kvfile.info(path).n_done == 480
        with opened(tiny_llama, path) as other:
            check_same(other, small())
        session.decode(tokens[480:])
        kvfile.end(session)
        check_same(session, small())
    kvfile.verify(path)


def test_cut_short_while_open(tiny_llama: LlamaModel, tmp_path: Path) -> None:
    """Breaks when a file that somebody truncates kills the process at the next question."""
    path = written(tiny_llama, METHODS["default"], tmp_path / "a.akv")
    with opened(tiny_llama, path) as session:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(StateError, match="truncated: it has"):
            session.decode(TOKENS[:3])
        assert session.n_past == N_HISTORY


LOST = r"truncated: it has|is damaged|could not be read"


def cut_short_within_a_window(model_path: Path, path: Path, *, put_back: bool) -> None:
    """For a child process: a file loses its chunks between two layers of a window, and perhaps gets them back."""
    with loaded(model_path) as model, opened(model, path) as session, opened(model, path) as other:
        n_bytes, before = path.stat().st_size, session.n_past
        session.decode(TOKENS[:2], phase="decode")  # chunks of this step have been checked, and are not again
        session.rewind(before)

        def cut(name: str, layer: int, n_past: int, _: object) -> None:
            if (name, layer) == ("q", 1):
                os.truncate(path, 4096)
                if put_back:
                    os.truncate(path, n_bytes)

        session.observer = cut
        with pytest.raises(StateError, match=LOST):
            session.decode(TOKENS[:2], phase="decode")
        session.observer = None
        assert session.n_past == before
        for use in (lambda: session.decode(TOKENS[:1]), session.state_get, lambda: other.decode(TOKENS[:1])):
            with pytest.raises(StateError, match=LOST):
                use()
        with open_session(model, METHODS["default"]) as fresh:
            fresh.decode(TOKENS)


@pytest.mark.parametrize("put_back", [False, True])
def test_cut_short_within_a_window(put_back: bool, tmp_path: Path) -> None:
    """Breaks when a file that somebody truncates kills a process that computes with it, or zeros are taken for keys."""
    model_path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    with loaded(model_path) as model:
        path = written(model, METHODS["default"], tmp_path / "a.akv")
    _, status = os.waitpid(forked(lambda: cut_short_within_a_window(model_path, path, put_back=put_back)), 0)
    assert status == 0


def test_other_faults_go_where_they_went(tmp_path: Path) -> None:
    """Breaks when a fault in memory that is not ours is held back."""
    model_path = tiny.make_tiny_gguf(tmp_path / "model.gguf")
    (tmp_path / "foreign").write_bytes(bytes(65536))

    def work() -> None:
        faulthandler.disable()  # pytest's: what it prints would look like a failure
        with (
            loaded(model_path) as model,
            opened(model, written(model, METHODS["default"], tmp_path / "a.akv")),
            (tmp_path / "foreign").open("r+b") as file,
            mmap.mmap(file.fileno(), 65536) as foreign,
        ):
            os.truncate(tmp_path / "foreign", 0)
            foreign[4096]

    _, status = os.waitpid(forked(work), 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGBUS


# what of a file is in memory


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and of files, those on tmpfs too."""
    status = Path("/proc/self/status").read_text()
    found = {name: 1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
    return {"own": found["RssAnon"], "files": found["RssFile"] + found["RssShmem"]}


def test_memory_holds_what_is_attended(tmp_path: Path) -> None:
    """Breaks when chunks that are in the file stay in memory while it is read, or all of a file enters by opening."""
    model_path = tiny.make_tiny_gguf(tmp_path / "model.gguf", n_layer=2, n_head=8, n_head_kv=8, d_head=64)
    n_tokens, tokens = 12_000, random_tokens(12_000)
    retrieval = small(n_local=256, window=256, chunk=64, budget=4 + 256 + 2 * 64)
    path, largest = tmp_path / "a.akv", 0
    with loaded(model_path) as model, open_session(model, retrieval, n_ctx=n_tokens + 100) as session:
        pieces: Pieces = [(n_tokens, "prefill")]
        kvfile.begin(session, path, tokens, phases_of(pieces), SECTION, checkpoint_tokens=1024)
        kvfile.spill(session)
        before = sum(resident().values())

        def look(done: int, total: int) -> None:
            nonlocal largest
            largest = max(largest, sum(resident().values()) - before)

        session.progress = look
        session.decode(tokens)
        kvfile.end(session)
    kv_bytes = path.stat().st_size
    assert kv_bytes > 4096 * n_tokens
    assert largest < kv_bytes * 3 / 4  # half of it where this was written: chunks attended, and what does not grow
    with loaded(model_path) as model:
        found = resident()
        with opened(model, path, n_ctx=n_tokens + 100) as session:
            assert resident()["files"] - found["files"] < kv_bytes / 10
            session.decode(tokens[:4], phase="decode")
            # Keys, which an index of so few is made of: 23 MB. Of what it holds already, the system maps up to 2 MB
            # around what is asked for: 6 MB of values.
            assert resident()["files"] - found["files"] < kv_bytes * 2 / 3
            session.state_get()
            assert resident()["files"] - found["files"] > kv_bytes * 3 / 4
