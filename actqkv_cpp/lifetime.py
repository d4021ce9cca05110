"""The order in which sessions and their model are freed: every session over a model before it, and nothing at all while
a thread computes with one of them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from actqkv_cpp.errors import StateError, ThreadError

if TYPE_CHECKING:
    from actqkv_cpp._native import Session


class Guard:
    """Of one model: the sessions over it, and the calls without a session that run now."""

    def __init__(self) -> None:
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._n_running = 0
        self._closed = False

    def watch(self, owner: Any, name: str) -> None:
        """Have calls of a method, which may run for seconds without the GIL, keep the model from being freed."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if self._closed:
                    raise StateError("the Llama is closed", "make a new one")
                self._n_running += 1
            try:
                return method(*args, **kwargs)
            finally:
                with self._lock:
                    self._n_running -= 1

        setattr(owner, name, watched)

    def close(self, known: Session | None = None) -> None:
        """Close all sessions; the model may be freed then. May be called twice.

        Args:
            known: a session to be closed too where the garbage collector has cleared `sessions`.

        Raises:
            ThreadError: a thread is in a call; nothing was closed.
        """
        with self._lock:
            if self._n_running:
                raise ThreadError(
                    f"thread {threading.current_thread().name!r} closes a model that another thread is using",
                    "wait for that thread first",
                )
            close_all({*self.sessions, *([known] if known is not None else [])})
            self._closed = True


def guard_of(model: Any) -> Guard:
    """The guard of a llama_cpp LlamaModel, made at the first call: from then on the model closes it first."""
    found: Guard | None = getattr(model, "_actqkv_guard", None)
    if found is None:
        guard = found = model._actqkv_guard = Guard()
        own = model.close

        def close() -> None:
            guard.close()
            own()

        model.close = close
    return found


def close_all(sessions: Iterable[Session]) -> None:
    """Close sessions, all of them or none.

    Raises:
        ThreadError: a thread is in a call of one of them; nothing was freed.
    """
    still_open = [session for session in sessions if not session.closed]
    with ExitStack() as held:
        for session in still_open:
            held.enter_context(session._exclusive())
        for session in still_open:
            session._free()
