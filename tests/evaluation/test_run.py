"""The runner on the bundled model: every suite in small, readings shared, a killed run gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import make_tiny_gguf

import actqkv_cpp
from actqkv_cpp import Llama
from actqkv_cpp.errors import Cancelled, ModelError, ParameterError, StateError
from actqkv_cpp.evaluation import engines, journal
from actqkv_cpp.evaluation.engines import EngineSettings, methods
from actqkv_cpp.evaluation.results import RESULT, Result
from actqkv_cpp.evaluation.runner import Plan, evaluate
from actqkv_cpp.evaluation.suites import SUITES, longbench

pytestmark = pytest.mark.model
SETTINGS = EngineSettings(
    model=actqkv_cpp.default_model_path(), n_sink=64, n_local=256, chunk=None, kv_type="f16", n_threads=1
)


def plan(*suites: str, **change: Any) -> Plan:
    known: dict[str, Any] = {
        "suites": tuple(SUITES[name] for name in suites),
        "lengths": (2048,),
        "methods": tuple(methods(["actqkv"], [1024])),
        "n_samples": 1,
        "seed": 0,
    }
    return Plan(**(known | change))


def run(plan: Plan, folder: Path | None = None, **change: Any) -> Result:
    return evaluate(plan, replace(SETTINGS, **change), folder=folder, watch=lambda done, total, what: None)


VARYING = ("prefill_tokens_per_s", "decode_tokens_per_s", "resident_bytes", "started", "load_average")


def plain(value: Any) -> Any:
    """The JSON of a result without what differs from run to run."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in VARYING}
    return [plain(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the method of each reading."""
    found: list[str] = []
    read = Llama.read

    def counted(self: Llama, *args: Any, **kwargs: Any) -> Any:
        found.append(self.retrieval.method)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Llama, "read", counted)
    return found


@pytest.fixture(scope="module")
def trained() -> int:
    """Tokens that the bundled model was trained on."""
    with Llama(n_ctx=1, verbose=False) as llm:
        return llm.n_ctx_train


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("long-answer", "ruler")])
def test_smoke(name: str) -> None:
    """A suite does not run, or gives no figures."""
    (row,) = run(plan(name)).rows
    assert row.reason is None
    assert row.total.n >= 1
    assert row.total.score is not None
    assert (row.total.ci_low or 0.0) <= row.total.score <= (row.total.ci_high or 0.0)
    if name != "perplexity":
        assert 512 < (row.attended_max or 0) <= 1024 + 256
        assert 1500 < (row.length_mean or 0) <= 2048
        assert (row.prefill_tokens_per_s or 0) > 0


def test_smoke_of_ruler() -> None:
    """One of the eight tasks does not run."""
    (row,) = run(plan("ruler", n_samples=8, lengths=(1024,))).rows
    assert len(row.tasks) == 8
    assert row.total.n == 8


def test_smoke_of_long_answer() -> None:
    """The generated text does not fill the session, or what stood before it is forgotten."""
    (row,) = run(plan("long-answer", lengths=(4096,))).rows
    assert row.total.n == 5
    assert 4096 - 512 < (row.length_mean or 0) <= 4096


def test_the_model_finds_a_pass_key() -> None:
    """Prompts of the harness are none that the model understands; or the score does not see a right answer."""
    (row,) = run(plan("passkey", n_samples=3)).rows
    assert row.total.score is not None
    assert row.total.score >= 2 / 3
    assert set(row.depths) == {0.0, 0.5, 1.0}


def test_perplexity_against_dense() -> None:
    """Dense attention differs from itself, or a budget that holds everything from dense attention."""
    two = plan("perplexity", methods=tuple(methods(["dense", "actqkv", "streaming"], [2048])), lengths=(2048,))
    dense, all_in, streaming = (row.total.measures for row in run(two).rows)
    assert dense["kl"] == 0.0
    assert all_in["kl"] == pytest.approx(0.0, abs=1e-4)
    assert all_in["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)
    assert streaming["nll"] > 0


def test_divergence_beyond_the_trained_window(tmp_path: Path) -> None:
    """Divergence is from dense attention of another model, or at the positions of the method that is named first."""
    both = plan("perplexity", methods=tuple(methods(["streaming", "actqkv"], [2048])), lengths=(1024,))
    for seed in (0, 1):  # models of one vocabulary, for which the text is the same
        model = make_tiny_gguf(tmp_path / f"{seed}.gguf", seed=seed, n_ctx_train=256)
        _, all_in = (row.total.measures for row in run(both, model=model, n_local=512).rows)
        assert all_in["kl"] == pytest.approx(0.0, abs=1e-6)


def test_equal_readings_are_shared(readings: list[str]) -> None:
    """A document is read again for each question, or for methods whose readings are equal."""
    names = ["actqkv", "actqkv-equal", "streaming"]
    shared = run(plan("kv", methods=tuple(methods(names, [512])), lengths=(1024,)))
    assert readings == ["actqkv", "streaming"]
    for name, row in zip(names, shared.rows, strict=True):
        (alone,) = run(plan("kv", methods=tuple(methods([name], [512])), lengths=(1024,))).rows
        assert (alone.total, alone.depths) == (row.total, row.depths)
        assert (alone.attended_mean, alone.attended_max) == (row.attended_mean, row.attended_max)


def test_budgets_are_not_shared_where_reading_uses_them(readings: list[str]) -> None:
    """A reading at one budget answers for another."""
    small, large = run(plan("passkey", methods=tuple(methods(["actqkv"], [512, 768])), lengths=(1024,))).rows
    assert readings == ["actqkv", "actqkv"]
    assert (small.attended_max or 0) < (large.attended_max or 0)


def test_changed_columns(readings: list[str]) -> None:
    """A change to a method's row is ignored, or a reading that it changes is shared."""
    names = ["actqkv", "actqkv:refine=1", "actqkv:n_local=128", "actqkv:probe=mean", "actqkv:chunk=16"]
    rows = run(plan("kv", methods=tuple(methods(names, [512])), lengths=(1024,))).rows
    assert [row.cell.method for row in rows] == names
    assert readings == ["actqkv", "actqkv", "actqkv", "actqkv"]  # refinement is a matter of answering alone
    chunk_tokens = {row.cell.method: (row.attended_max or 0) for row in rows}
    assert chunk_tokens["actqkv:chunk=16"] <= chunk_tokens["actqkv"]


def test_types_of_chunks(readings: list[str]) -> None:
    """A type given with a method is ignored, or a reading is shared by two types, or compared with its own type."""
    names = ["actqkv:kv_type=q4_0", "actqkv", "actqkv:refine=1"]
    rows = run(plan("perplexity", "kv", methods=tuple(methods(names, [512])), lengths=(1024,))).rows
    assert readings == ["actqkv", "actqkv"]  # of kv; perplexity reads by itself
    kl = {row.cell.method: row.total.measures["kl"] for row in rows if row.cell.suite == "perplexity"}
    assert kl["actqkv:kv_type=q4_0"] != kl["actqkv"]
    (dense,) = run(plan("perplexity", methods=tuple(methods(["dense:kv_type=q4_0"], [512])), lengths=(1024,))).rows
    assert dense.total.measures["kl"] > 0


def test_question_aware(readings: list[str]) -> None:
    """A question-aware column is read once for all questions, which would know only one of them."""
    question_aware = tuple(methods(["actqkv+question"], [512]))
    (row,) = run(plan("kv", methods=question_aware, lengths=(1024,))).rows
    assert len(readings) == row.total.n == 10
    assert row.length_mean is not None
    assert row.length_mean + 64 <= 1024  # with the question in it twice, and room for a UUID
    long, _ = run(plan("long-answer", "passkey", methods=question_aware, lengths=(4096,))).rows
    assert long.total.score is None
    assert "after a text that is generated" in (long.reason or "")


def test_what_cannot_run_is_not_zero(trained: int) -> None:
    """Exact positions beyond the trained window give a figure, or a score of 0."""
    names = ["dense", "llama.cpp", "quest", "actqkv"]
    rows = run(plan("passkey", methods=tuple(methods(names, [1024])), lengths=(1024, trained + 256))).rows
    scores = {(row.cell.method, row.cell.length): row.total.score for row in rows}
    assert all(scores[name, 1024] is not None for name in names)
    for name in names[:3]:
        assert scores[name, trained + 256] is None
        reason = next(row.reason for row in rows if (row.cell.method, row.cell.length) == (name, trained + 256))
        assert f"trained length of {trained:,}" in (reason or "")
    assert scores["actqkv", trained + 256] is not None
    assert {row.cell.method: row.dense_max is not None for row in rows if row.cell.length == 1024} == {
        "dense": False,
        "llama.cpp": False,
        "quest": True,
        "actqkv": False,
    }


def test_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that does not fit in RAM stops the lengths that do; or nothing that fits is an empty table."""
    monkeypatch.setattr(engines.machine, "available_memory", lambda: 40_000_000)
    small, large = run(plan("passkey", lengths=(2048, 1 << 20))).rows
    assert small.total.score is not None
    assert "are free" in (large.reason or "")
    with pytest.raises(ParameterError, match="nothing can run: 1,048,576 tokens need"):
        run(plan("passkey", lengths=(1 << 20,)))


def test_what_is_done_stays_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is gone on with where memory is short now, and its figures become "cannot run"."""
    wanted = plan("passkey", n_samples=1, lengths=(4096,))
    done = run(wanted, tmp_path / "out")
    monkeypatch.setattr(engines.machine, "available_memory", lambda: 30_000_000)
    with pytest.raises(ParameterError, match="nothing can run"):
        run(wanted)
    assert run(wanted, tmp_path / "out").to_json()["rows"] == done.to_json()["rows"]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """A run that was killed on the way and gone on with gives another result, or does its work twice."""
    names = tuple(methods(["actqkv", "streaming"], [512]))
    two = plan("passkey", "number", methods=names, n_samples=2, lengths=(1024,))
    whole = run(two, tmp_path / "whole")
    n_watched = 0

    def kill(done: int, total: int, what: str) -> bool:
        nonlocal n_watched
        n_watched += 1
        return n_watched < 12

    with pytest.raises(Cancelled):
        evaluate(two, SETTINGS, folder=tmp_path / "killed", watch=kill)
    path = tmp_path / "killed" / journal.JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert 1 < len(lines) < 9
    path.write_text("".join(lines) + lines[-1][:40], encoding="utf-8")  # what a kill leaves of a line
    assert not (tmp_path / "killed" / RESULT).exists()

    killed = run(two, tmp_path / "killed")
    assert plain(killed.to_json()) == plain(whole.to_json())
    assert path.read_text(encoding="utf-8").startswith("".join(lines))
    files = [json.loads((tmp_path / name / RESULT).read_text()) for name in ("whole", "killed")]
    assert plain(files[0]) == plain(files[1])
    assert run(two, tmp_path / "killed").to_json() == killed.to_json()  # nothing is left to do
    with pytest.raises(StateError, match="seed"):
        run(replace(two, seed=1), tmp_path / "killed")


def test_files(tmp_path: Path, trained: int) -> None:
    """Samples of a file share a session that is too long or too short for them."""
    row = {"input": "What is the pass key?", "answers": ["71432"], "dataset": "hotpotqa"}
    noise = "The grass is green. The sky is blue. "
    rows = [row | {"context": noise * n + "The pass key is 71432. " + noise * n} for n in (5, 60, trained // 16)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    names = tuple(methods(["actqkv", "dense"], [1024]))
    found = run(Plan(suites=tuple(longbench.load(path)), lengths=(), methods=names, seed=0))
    ours, dense = found.rows
    assert (ours.cell.suite, ours.cell.length, ours.total.n) == ("longbench/hotpotqa", None, 3)
    assert dense.total.n == 2
    assert "1 of 3 samples: exact positions" in (dense.reason or "")
    cut = run(Plan(suites=tuple(longbench.load(path)), lengths=(), methods=names, seed=0, longest=4096))
    assert [row.n_cut for row in cut.rows] == [1, 1]
    assert [row.total.n for row in cut.rows] == [3, 3]


def test_without_chat_template(tmp_path: Path) -> None:
    """A base model is asked in prompts that it has never seen, and its failures are counted."""
    model = make_tiny_gguf(tmp_path / "base.gguf", chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        run(plan("passkey"), model=model)


def test_model_that_only_llama_cpp_runs(tmp_path: Path) -> None:
    """llama.cpp's dense attention is shown as a method of ours."""
    model = make_tiny_gguf(tmp_path / "gemma.gguf", arch="gemma", tied=True)
    ours, theirs = run(
        plan("passkey", methods=tuple(methods(["actqkv", "llama.cpp"], [1024])), lengths=(1024,)), model=model
    ).rows
    assert ours.total.score is None
    assert "our graph lacks" in (ours.reason or "")
    assert theirs.total.score is not None


@pytest.mark.parametrize(
    ("names", "budgets", "words"),
    [
        (["actqvk"], [2048], "actqvk"),
        ([], [2048], "no method"),
        (["actqkv"], [], "no method"),
        (["+question"], [1], "question"),
        (["actqkv:chunk"], [2048], "once, with its value"),
        (["actqkv:chnk=16"], [2048], "chnk"),
        (["actqkv:chunk=16:chunk=32"], [2048], "once"),
        (["actqkv:chunk=many"], [2048], "many"),
        (["actqkv:refine=few"], [2048], "few"),
        (["actqkv:score=cosin"], [2048], "cosin"),
        (["actqkv:budget=512"], [2048], "budget"),
        (["actqkv:kv_type=q8"], [2048], "kv_type 'q8'"),
        (["actqkv:kv_type=q8_0:kv_type=f16"], [2048], "once"),
    ],
)
def test_unknown_methods(names: list[str], budgets: list[int], words: str) -> None:
    """A typing error is found after an hour."""
    with pytest.raises(ParameterError, match=words):
        methods(names, budgets)


def test_room_is_checked_before_anything_is_read(readings: list[str]) -> None:
    """The last length of a run has no room for a document, which is found after the others were run."""
    with pytest.raises(ParameterError, match="ruler has no room"):
        run(plan("passkey", "ruler", lengths=(2048, 160)))
    assert readings == []


def test_progress_reaches_its_end() -> None:
    """The time left is told from a total that is never reached."""
    seen: list[tuple[int, int]] = []
    evaluate(
        plan("passkey", methods=tuple(methods(["actqkv", "actqkv-equal"], [1024]))),
        SETTINGS,
        folder=None,
        watch=lambda done, total, what: seen.append((done, total)),
    )
    assert {total for _, total in seen} == {2 * 2048}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done <= total for done, total in seen)


def test_recalls_are_kept_where_asked_for() -> None:
    """Recalls are recorded without being asked for, or lost on their way to the rows."""
    names = tuple(methods(["actqkv", "streaming", "llama.cpp"], [512]))
    ours, streaming, peer = run(plan("passkey", methods=names, lengths=(1024,), recalls="needle")).rows
    assert ours.total.recalls["needle_selected"] >= 0.0
    assert streaming.depths[0.5].recalls["needle_selected"] in (0.0, 1.0)
    assert peer.total.recalls == {}
    assert "attention_mass" not in ours.total.recalls


def test_a_length_that_is_named_twice() -> None:
    """One length, written 1k and 1024, gives two equal rows, which a report refuses."""
    assert plan("kv", lengths=(2048, 1024, 2048)).lengths == (2048, 1024)


def test_length_of_nothing() -> None:
    """A length of 0 is refused only when the model is loaded, in the words of another option."""
    with pytest.raises(ParameterError, match="a length of 0 tokens"):
        plan("kv", lengths=(2048, 0))
