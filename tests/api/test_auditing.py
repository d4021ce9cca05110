"""Breaks when audits widen the budget where retrieval finds enough, or leave it where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actqkv_cpp import Llama, ParameterError, Retrieval
from actqkv_cpp.auditing import N_AUDITS, Auditor

FILLER = "A weaver described the second vase near the shore. They slowly counted the golden rug by the fence. "
SMALL = Retrieval(n_local=64, window=32, n_sink=4, chunk=16, budget=100)


@dataclasses.dataclass
class Audited:
    """A session in which every answered token brings an audit with the next of `recalls`."""

    recalls: Iterator[float]
    budget: int = 100
    n_audits: int = 0
    audit_recall_last: float = 0.0

    def stats(self) -> Audited:
        return self

    @property
    def answering(self) -> Audited:
        return self

    def widen(self, budget: int) -> None:
        self.budget = budget

    def step(self, auditor: Auditor, n: int = 1) -> list[int]:
        """The budget after each of n answered tokens."""
        budgets = []
        for _ in range(n):
            self.n_audits, self.audit_recall_last = self.n_audits + 1, next(self.recalls)
            auditor.look()
            budgets.append(self.budget)
        return budgets


def audited(recalls: list[float], *, least: float | None = 0.9, most: int = 300) -> tuple[Any, Auditor]:
    session: Any = Audited(iter(recalls))
    return session, Auditor(session, 1, least, most, session.widen)


def test_the_budget_widens_after_eight_low_audits() -> None:
    """Breaks when the budget does not double, or earlier than after eight audits, or beyond its most."""
    session, auditor = audited([0.5] * 30)
    assert session.step(auditor, 30) == [100] * (N_AUDITS - 1) + [200] * N_AUDITS + [300] * 15


@pytest.mark.parametrize("recalls", [[0.95] * 30, [0.85, 1.0] * 15, [1.0] * 7 + [0.3] + [1.0] * 22])
def test_the_budget_stays_where_recall_is_enough(recalls: list[float]) -> None:
    """Breaks when an easy case, or one bad head among good ones, widens the budget."""
    session, auditor = audited(recalls)
    assert set(session.step(auditor, 30)) == {100}


def test_only_the_last_eight_count() -> None:
    """Breaks when a good beginning hides what comes later."""
    session, auditor = audited([1.0] * 20 + [0.5] * 8)
    budgets = session.step(auditor, 28)
    assert budgets[:20] == [100] * 20
    assert budgets[-1] == 200


def test_without_a_least_recall_nothing_widens() -> None:
    """Breaks when audits alone change results."""
    session, auditor = audited([0.0] * 20, least=None)
    assert set(session.step(auditor, 20)) == {100}
    assert auditor.report().recall == 0.0


def test_a_token_without_an_audit_counts_nothing() -> None:
    """Breaks when one audit is counted for every token that follows it, or a reset of statistics is taken for one."""
    session, auditor = audited([0.5, 0.7])
    session.step(auditor)
    auditor.look()
    auditor.look()
    assert auditor.report().n == 1
    session.n_audits = 0
    auditor.begin_answer()
    auditor.look()
    assert (auditor.report().n, auditor.report().recall, auditor.report().min_recall) == (0, None, None)
    session.step(auditor)
    assert (auditor.report().n, auditor.report().recall) == (1, 0.7)


@pytest.mark.parametrize(("every", "least"), [(-1, None), (0, 0.9), (4, 1.5), (4, -0.1)])
def test_wrong_values(every: int, least: float | None) -> None:
    """Breaks when a value out of range is taken."""
    session: Any = Audited(iter([]))
    with pytest.raises(ParameterError):
        Auditor(session, every, least, 100, session.widen)


def test_answers_report_their_audit(tiny_model: Path) -> None:
    """Breaks when audits of a real session do not reach the answer, or do not widen its budget."""
    with Llama(tiny_model, n_ctx=1024, n_threads=1, retrieval=SMALL, verbose=False) as llm:
        document = llm.read(text=FILLER * 6)
        plain = document.ask("where", max_tokens=20)
        assert plain.audit is None
        assert "audit" not in plain.to_json()
        llm.audit(2)
        watched = document.ask("where", max_tokens=20)
        assert watched.text == plain.text
        assert watched.audit is not None
        assert watched.audit.n == pytest.approx(watched.usage.completion_tokens / 2, abs=1)
        assert watched.audit.recall is not None
        assert watched.audit.min_recall is not None
        assert 0 < watched.audit.min_recall <= watched.audit.recall <= 1
        assert watched.to_json()["audit"]["budget"] == watched.audit.budget == 100
        llm.audit(1, min_recall=0.999, max_budget=150)
        wide = document.ask("where", max_tokens=20).audit
        assert wide is not None
        assert wide.budget == 150
        assert llm.session is not None
        assert llm.session.params.budget == 100
        llm.audit(0)
        assert document.ask("where", max_tokens=2).audit is None


def test_records_of_a_document(tiny_model: Path) -> None:
    """Breaks when `record` misses the reading or the answer, or goes on after its block."""
    with Llama(tiny_model, n_ctx=1024, n_threads=1, retrieval=SMALL, verbose=False) as llm:
        with llm.record(mass="answers") as trace:
            document = llm.read(text=FILLER * 6)
            n = llm.n_tokens
            answer = document.ask("where", max_tokens=5)
        n_records = len(trace)
        document.ask("where", max_tokens=2)
        assert len(trace) == n_records
        assert llm.session is not None
        assert trace.n_layer == llm.session.n_layer
        # The prompt's last token is a step too.
        assert len(trace.answers()) == trace.n_layer * (answer.usage.completion_tokens + 1)
        assert ((trace.mass_recall() > 0) & (trace.mass_recall() < 1)).all()
        assert (trace.token_bias(n)[:, : n // 32 * 32] >= 0).all()
