"""The rule by which audits of the retrieval widen the budget of answering (see `Llama.audit`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from actqkv_cpp.errors import ParameterError
from actqkv_cpp.results import Audit

if TYPE_CHECKING:
    from actqkv_cpp._native import Session

N_AUDITS = 8  # at one budget, before their mean may change it: single heads differ by more than budgets do


class Auditor:
    """Follows the audits of a session, one answer after another.

    Args:
        session: audits itself (`Session.set_audit`).
        every: tokens from audit to audit.
        min_recall: widen the budget where the mean of the last N_AUDITS recalls at this budget is less; None: never.
        max_budget: tokens; the budget grows no further.
        widen: called with the new budget.
    """

    def __init__(
        self,
        session: Session,
        every: int,
        min_recall: float | None,
        max_budget: int,
        widen: Callable[[int], None],
    ) -> None:
        if every < 0:
            raise ParameterError(f"audits are every N tokens, N at least 0, not {every}")
        if min_recall is not None and not 0.0 <= min_recall <= 1.0:
            raise ParameterError(f"min_recall is 0 to 1, not {min_recall}")
        if min_recall is not None and every == 0:
            raise ParameterError("min_recall needs audits", "give the number of tokens from audit to audit")
        self.every, self.min_recall, self.max_budget = every, min_recall, max_budget
        self._session, self._widen = session, widen
        self._n_seen = session.stats().n_audits
        self._at_budget: list[float] = []  # recalls since the budget last changed
        self._of_answer: list[float] = []

    def follow(self, session: Session) -> None:
        """Another session has taken the place of the one that was audited."""
        session.set_audit(self.every)
        self._session, self._n_seen, self._at_budget = session, 0, []

    def begin_answer(self) -> None:
        """The session's statistics were just reset."""
        self._n_seen = 0
        self._of_answer = []

    def look(self) -> None:
        """After an answered token: take in the audit that was due, if any, and widen the budget where it must be."""
        stats = self._session.stats()
        if stats.n_audits <= self._n_seen:
            self._n_seen = stats.n_audits
            return
        self._n_seen = stats.n_audits
        self._of_answer.append(stats.audit_recall_last)
        self._at_budget = [*self._at_budget, stats.audit_recall_last][-N_AUDITS:]
        budget = self._session.answering.budget
        enough = self.min_recall is None or sum(self._at_budget) >= self.min_recall * len(self._at_budget)
        if enough or len(self._at_budget) < N_AUDITS or budget >= self.max_budget:
            return
        self._widen(min(2 * budget, self.max_budget))
        self._at_budget = []

    def report(self) -> Audit:
        """On the answer so far."""
        recalls = self._of_answer
        return Audit(
            n=len(recalls),
            recall=sum(recalls) / len(recalls) if recalls else None,
            min_recall=min(recalls, default=None),
            budget=self._session.answering.budget,
        )
