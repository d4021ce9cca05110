"""What stands in `Llama._ctx`, where llama_cpp.Llama expects a context of llama.cpp, and what in a closed Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from actqkv_cpp.errors import StateError

if TYPE_CHECKING:
    from actqkv_cpp._native import Session


class Closed:
    """Takes the place of model, context and tokenizer: the base hands null pointers of theirs to libllama."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StateError("the Llama is closed", "make a new one")


class SessionContext:
    """What llama_cpp.Llama asks of its `_ctx`, answered by a session; `ctx` is the base's own, empty context."""

    def __init__(self, session: Session, own: Any) -> None:
        self._session = session
        self._own = own

    @property
    def ctx(self) -> Any:
        return self._own.ctx

    def n_ctx(self) -> int:
        return self._session.params.n_ctx

    def pooling_type(self) -> int:
        return cast(int, self._own.pooling_type())

    def kv_cache_clear(self) -> None:
        self._session.rewind(0)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Forget tokens from p0 on; False (nothing done) for a stretch that does not reach the end."""
        if 0 <= p1 < self._session.n_past:
            return False
        if p0 < self._session.n_past:
            self._session.rewind(max(p0, 0))
        return True

    def reset_timings(self) -> None:
        self._session.stats_reset()

    def print_timings(self) -> None:
        """Nothing: `session.stats()` has the figures."""
