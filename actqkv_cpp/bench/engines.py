"""Engines with one face: a past of some depth, steps of answering, a batch of reading, and back to the depth."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from actqkv_cpp._native import KV_TYPES, Session
from actqkv_cpp.bench import peer
from actqkv_cpp.bench.results import Subject
from actqkv_cpp.errors import ComputeError, MemoryPlanError, ParameterError

if TYPE_CHECKING:
    from actqkv_cpp import Llama

Tokens = NDArray[np.int32]
Progress = Callable[[int, int], object]

_READ_TOKENS = 4096  # of one call while reading, for progress and Ctrl-C
_ITS_OWN = ("-E",)  # of another interpreter: its own packages, not those of our PYTHONPATH


def head_dimension(llm: Llama) -> int:
    """Numbers of one head's key."""
    arch, n_head = llm.metadata["general.architecture"], llama_cpp.llama_model_n_head(llm._model.model)
    return int(llm.metadata.get(f"{arch}.attention.key_length", llm._model.n_embd() // n_head))


class Engine(Protocol):
    """What is measured. The context holds `depth` tokens; `decode` and `prefill` add to them, `rewind` goes back.

    copied: the context is of the right size, but copies of its first tokens stand for the others.
    """

    subject: Subject
    depth: int
    copied: bool

    def decode(self, tokens: Tokens) -> float:
        """Seconds to answer all tokens but the first, which brings the weights back into the caches."""

    def prefill(self, tokens: Tokens) -> float:
        """Seconds to read tokens [n] as one batch; the logits of the last are computed."""

    def rewind(self) -> None:
        """Forget what came after `depth`."""


class Ours:
    """A session of ours. Its statistics are of the last sample.

    Args:
        session: one that holds nothing.
        read: tokens that are really read; deeper contexts are made of copies of their chunks. None: all.
    """

    def __init__(self, session: Session, *, read: int | None = None) -> None:
        self.session = session
        self.subject = Subject("actqkv", session.params.method, session.params.kv_type)
        self.depth = 0
        self.copied = False
        self._read = read

    def reach(self, tokens: Tokens, progress: Progress) -> None:
        """Read on until the context is as long as `tokens`, which begin with what was read before."""
        n_read = self.to_read(len(tokens))
        for begin in range(self.depth, n_read, _READ_TOKENS):
            self.session.decode(tokens[begin : min(begin + _READ_TOKENS, n_read)])
            progress(min(begin + _READ_TOKENS, n_read), n_read)
        if n_read < len(tokens):
            self.session.repeat(len(tokens))
            self.copied = True
        self.depth = len(tokens)
        self.session.checkpoint()  # so that a rewind reads nothing again

    def to_read(self, depth: int) -> int:
        """Of a context of `depth` tokens, how many are read and not copied."""
        return depth if self._read is None else min(depth, self._read)

    def decode(self, tokens: Tokens) -> float:
        self._step(int(tokens[0]))
        self.session.stats_reset()
        begin = time.perf_counter()
        for token in tokens[1:].tolist():
            self._step(token)
        return time.perf_counter() - begin

    def prefill(self, tokens: Tokens) -> float:
        self.session.stats_reset()
        begin = time.perf_counter()
        self.session.decode(tokens, n_logits=1)
        return time.perf_counter() - begin

    def rewind(self) -> None:
        if self.session.n_past > self.depth:
            self.session.rewind(self.depth)

    def _step(self, token: int) -> None:
        self.session.decode([token], phase="decode", n_logits=1)


class Peer(Engine, Protocol):
    """llama.cpp: one context at a time, dense, flash attention on."""

    @property
    def blob_bytes(self) -> int:
        """Bytes kept between contexts, in this process."""

    def open(self, n_ctx: int) -> None:
        """Make a context that holds nothing. MemoryPlanError where there is no room."""

    def fill(self, tokens: Tokens, *, n_read: int, keep: bool, progress: Progress) -> None:
        """Hold all of `tokens` but the last: the first `n_read` read, the others copies of those."""

    def close(self) -> None:
        """Free the context."""

    def quit(self) -> None:
        """No further context is wanted."""


class LinkedPeer(peer.LlamaCpp):
    """The llama.cpp that we link, over the same loaded model."""

    no_memory = MemoryPlanError
    failed = ComputeError

    def __init__(self, model: Any, *, n_batch: int, n_threads: int, kv_type: str, kv_in_ram: bool = False) -> None:
        super().__init__(
            model.model, n_batch=n_batch, n_threads=n_threads, type_kv=KV_TYPES[kv_type], kv_in_ram=kv_in_ram
        )
        self.subject = Subject("llama.cpp", "dense", kv_type)

    def quit(self) -> None:
        self.close()


class OtherPeer:
    """The llama_cpp of another interpreter, in a child process, over weights of its own.

    Args:
        python: the interpreter. The file runs `peer.py`.
        model: the model's file.

    Raises:
        ParameterError: there is no such interpreter, it has no llama_cpp, or that does not load the model.
    """

    blob_bytes = 0

    def __init__(self, python: str, model: str, *, n_batch: int, n_threads: int, kv_type: str) -> None:
        self.subject = Subject("other llama.cpp", "dense", kv_type)
        self.depth, self.copied = 0, False
        self._python = python
        self._n_batch = n_batch
        self._check()
        load: dict[str, Any] = {
            "path": str(Path(model).absolute()),
            "n_batch": n_batch,
            "n_threads": n_threads,
            "type_kv": KV_TYPES[kv_type],
        }
        for extra_buffers in (True, False):  # some builds crash with them: machine.py
            self._start()
            try:
                self.version = str(self._call("load", extra_buffers=extra_buffers, **load))
                self._try()
                return
            except ComputeError as error:
                self.quit()
                if not extra_buffers:
                    raise ParameterError(
                        f"the llama_cpp of {python} does not run this model: {error}", "give another --peer-python"
                    ) from None

    def open(self, n_ctx: int) -> None:
        self._call("open", n_ctx=n_ctx)
        self.depth, self.copied = 0, False

    def fill(self, tokens: Tokens, *, n_read: int, keep: bool, progress: Progress) -> None:
        found = self._call("fill", progress=progress, tokens=tokens.tolist(), n_read=n_read, keep=keep)
        self.depth, self.copied = found["depth"], found["copied"]

    def decode(self, tokens: Tokens) -> float:
        return float(self._call("decode", tokens=tokens.tolist()))

    def prefill(self, tokens: Tokens) -> float:
        return float(self._call("prefill", tokens=tokens.tolist()))

    def rewind(self) -> None:
        self._call("rewind")

    def close(self) -> None:
        if self._child.poll() is None:
            self._call("close")

    def quit(self) -> None:
        self._child.kill()
        self._child.communicate()

    def _check(self) -> None:
        """An interpreter without llama_cpp is told from one that fails later."""
        try:
            tried = subprocess.run(
                [self._python, *_ITS_OWN, "-c", "import llama_cpp"], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ParameterError(
                f"{self._python} does not run: {error.strerror}", "give --peer-python a Python interpreter"
            ) from None
        if tried.returncode != 0:
            reason = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
            raise ParameterError(
                f"{self._python} has no llama_cpp: {reason}", f"{self._python} -m pip install llama-cpp-python"
            )

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [self._python, *_ITS_OWN, peer.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _try(self) -> None:
        self.open(self._n_batch + 1)
        self.prefill(np.zeros(self._n_batch, np.int32))
        self.close()

    def _call(self, do: str, progress: Progress | None = None, **arguments: Any) -> Any:
        to, answers = cast(IO[str], self._child.stdin), cast(IO[str], self._child.stdout)
        try:
            to.write(json.dumps({"do": do, **arguments}) + "\n")
            to.flush()
        except BrokenPipeError:
            pass  # it has ended, which the empty answer says
        for line in answers:
            found = json.loads(line)
            if "progress" in found and progress is not None:
                progress(*found["progress"])
            elif "error" in found:
                raise (MemoryPlanError if found["no_memory"] else ComputeError)(found["error"])
            else:
                return found["done"]
        raise ComputeError(f"it ended with status {self._child.wait()} while it was asked to {do}")
