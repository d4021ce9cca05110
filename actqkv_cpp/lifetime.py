"""The order in which sessions and their model are freed: every session over a model before it, and nothing at all while
a thread is in one of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actqkv_cpp._native import Session


def follow(model: Any, session: Session) -> None:
    """Make `model`, a llama_cpp LlamaModel, close this session before it frees itself."""
    if not hasattr(model, "_actqkv_sessions"):
        model._actqkv_sessions = weakref.WeakSet()
        own = model.close

        def close() -> None:
            close_all(sessions_over(model))
            own()

        model.close = close
    model._actqkv_sessions.add(session)


def sessions_over(model: Any) -> list[Session]:
    """The sessions over a model that are alive, closed ones among them."""
    return list(getattr(model, "_actqkv_sessions", ()))


def close_all(sessions: Iterable[Session]) -> None:
    """Close sessions, all of them or none.

    Raises:
        ThreadError: a thread is in a call of one of them; nothing was freed.
    """
    still_open = {session for session in sessions if not session.closed}
    with ExitStack() as held:
        for session in still_open:
            held.enter_context(session._exclusive())
        for session in still_open:
            session._free()
