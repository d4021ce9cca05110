"""Breaks when a build whose extra buffer types crash can reach the user's process, or cores are miscounted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from actqkv_cpp import Llama, ParameterError, machine
from actqkv_cpp.machine import Verdict, try_child

KILLED = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]


def test_child_that_dies_by_a_signal() -> None:
    """Breaks when a segmentation fault in the trial counts as safe."""
    verdict = try_child(KILLED)
    assert not verdict.safe
    assert "signal 11" in verdict.reason


def test_child_that_disagrees() -> None:
    """Breaks when a trial that found a mismatch counts as safe, or its message is lost."""
    verdict = try_child([sys.executable, "-c", "raise SystemExit('AMX: expected 1, found 2')"])
    assert verdict == Verdict(False, "AMX: expected 1, found 2")


def test_child_that_hangs() -> None:
    """Breaks when a trial that never ends blocks loading, or counts as safe."""
    verdict = try_child([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
    assert not verdict.safe
    assert "0.2 s" in verdict.reason


def test_child_that_cannot_start() -> None:
    """Breaks when a machine without a usable sys.executable counts as safe."""
    assert not try_child(["/no/such/python"]).safe
    assert not try_child([]).safe


def test_child_that_agrees() -> None:
    """Breaks when extra buffer types are never used."""
    assert try_child([sys.executable, "-c", "pass"]).safe


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ACTQKV_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ACTQKV_EXTRA_BUFFERS", raising=False)
    return tmp_path / "extra_buffers.json"


def test_verdict_is_remembered_per_library(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when every load pays for the trial, or a verdict outlives the library it was about."""
    calls: list[object] = []
    monkeypatch.setattr(machine, "try_child", lambda command: calls.append(command) or Verdict(False, "killed"))
    assert machine.extra_buffers() == machine.extra_buffers() == Verdict(False, "killed")
    assert len(calls) == 1
    assert len(json.loads(own_cache.read_text())) == 1
    monkeypatch.setattr(machine, "_machine_key", lambda: "another build")
    machine.extra_buffers()
    assert len(calls) == 2


def test_damaged_memory_is_tried_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a half-written cache file stops a load."""
    own_cache.write_text('{"x": ')
    monkeypatch.setattr(machine, "try_child", lambda command: Verdict(True, "tried"))
    assert machine.extra_buffers().safe


@pytest.mark.parametrize(("word", "safe"), [("on", True), ("off", False), ("OFF", False)])
def test_the_users_word_wins(word: str, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when ACTQKV_EXTRA_BUFFERS is ignored, or the trial runs all the same."""
    monkeypatch.setenv("ACTQKV_EXTRA_BUFFERS", word)
    monkeypatch.setattr(machine, "try_child", lambda command: pytest.fail("tried"))
    assert machine.extra_buffers().safe is safe


def test_wrong_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a misspelt setting is silently ignored."""
    monkeypatch.setenv("ACTQKV_EXTRA_BUFFERS", "of")
    with pytest.raises(ParameterError, match="ACTQKV_EXTRA_BUFFERS"):
        machine.extra_buffers()


@pytest.mark.parametrize("safe", [True, False])
def test_verdict_reaches_libllama(safe: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when an unsafe verdict does not switch the extra buffer types off."""
    monkeypatch.setattr(machine, "extra_buffers", lambda: Verdict(safe, "test"))
    with_verdict = Llama(tiny_model, verbose=False)
    assert with_verdict.model_params.use_extra_bufts is safe
    assert with_verdict._model.params.use_extra_bufts is safe
    with_verdict.close()


def test_available_memory() -> None:
    """Breaks when the memory check has nothing to compare with on Linux."""
    found = machine.available_memory()
    assert sys.platform != "linux" or (found is not None and found > 1 << 20)


@pytest.mark.parametrize(
    ("siblings", "allowed", "n_cores"),
    [
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, {0, 1, 4, 5}, 2),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {1, 2, 3}, 2),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {0, 1}, 1),
        ({0: "0", 1: "1"}, {0, 1}, 2),
        ({0: "0-1"}, {0, 1}, 2),  # unknown of one
        ({}, {0, 1, 2}, 3),
    ],
)
def test_available_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, siblings: dict[int, str], allowed: set[int], n_cores: int
) -> None:
    """Threads share cores and wait for each other, cores of others are counted, or a sandbox ends in a traceback."""
    for cpu, text in siblings.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    assert machine.available_cores() == n_cores
