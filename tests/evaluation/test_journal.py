"""The journal: what a kill leaves is taken up, what does not belong is refused and kept as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actqkv_cpp.errors import ParameterError, StateError
from actqkv_cpp.evaluation.journal import JOURNAL, Journal
from actqkv_cpp.evaluation.results import RESULT, Cell, Record
from actqkv_cpp.evaluation.samples import Finding

HEADER = {"version": "0.1.0", "commit": "abc", "model": "abc", "parameters": {"seed": 0, "lengths": [4096]}}
CELL = Cell(suite="kv", method="actqkv", budget=2048, length=4096)


def record(sample: int, text: str = "\u2028 é\n") -> Record:
    finding = Finding(score=1.0, references=("a", "b"), answer=text, recalls={"x": 0.5}, depth=0.25)
    return Record(cell=CELL, sample=sample, findings=(finding,), n_read=10, read_s=0.1)


def written(folder: Path, n: int = 3) -> Path:
    with Journal(folder, HEADER, {"started": "then"}) as journal:
        for i in range(n):
            journal.add(record(i))
    return folder / JOURNAL


def test_records_come_back(tmp_path: Path) -> None:
    """A run that goes on has other records than were kept, or runs them again."""
    written(tmp_path / "out")
    with Journal(tmp_path / "out", HEADER, {"started": "now"}) as journal:
        assert list(journal.records.values()) == [record(0), record(1), record(2)]
        assert journal.has(CELL, 2)
        assert not journal.has(CELL, 3)
        assert journal.facts == {"started": "then"}
        journal.add(record(3))
    with Journal(tmp_path / "out", HEADER, {}) as journal:
        assert len(journal.records) == 4


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    """A file in the folder's place is told without what to do, or is written over."""
    (tmp_path / "out").write_text("text")
    with pytest.raises(ParameterError, match="out is a file"):
        Journal(tmp_path / "out", HEADER, {})
    assert (tmp_path / "out").read_text() == "text"


def test_killed_at_any_byte(tmp_path: Path) -> None:
    """A journal that a kill cut anywhere cannot be gone on with, or loses whole records."""
    data = written(tmp_path / "whole").read_bytes()
    ends = [i for i, byte in enumerate(data, 1) if byte == ord("\n")]
    for cut in {0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[2] + 5, len(data) - 1, len(data)}:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(data[:cut])
        with Journal(folder, HEADER, {"started": "then"}) as journal:
            n_whole = max(sum(end <= cut for end in ends) - 1, 0)
            assert len(journal.records) == n_whole
            for i in range(n_whole, 3):
                journal.add(record(i))
        assert (folder / JOURNAL).read_bytes() == data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.2.0"}, "version 0.1.0, now it is 0.2.0"),
        ({"commit": "def"}, "commit abc, now it is def"),
        ({"model": "abd"}, "model abc"),
        ({"parameters": {"seed": 1, "lengths": [4096]}}, r"parameters\.seed 0, now it is 1"),
        ({"parameters": {"seed": 0, "lengths": [8192]}}, r"parameters\.lengths \[4096\]"),
        ({"parameters": {"seed": 0, "lengths": [4096], "kv_type": "q8_0"}}, "kv_type None"),
    ],
)
def test_another_run(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Results of two different runs are mixed in one file."""
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(StateError, match=words) as caught:
        Journal(tmp_path, HEADER | change, {})
    assert "--out" in str(caught.value.hint)
    assert path.read_bytes() == before


def test_a_file_of_something_else(tmp_path: Path) -> None:
    """A file that no run wrote is emptied, since it has no line end."""
    (tmp_path / JOURNAL).write_text('{"my": "notes"}')
    with pytest.raises(StateError, match="no journal"):
        Journal(tmp_path, HEADER, {})
    assert (tmp_path / JOURNAL).read_text() == '{"my": "notes"}'


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (0, '{"format": "other"}', "no journal"),
        (0, "hello", ":1: not JSON"),
        (0, '{"format": "actqkv-eval-journal", "format_version": 9}', "version 9"),
        (2, "{", ":3: not JSON"),
        (2, "[]", ":3: not a JSON object"),
        (2, "{}", ":3: no record"),
        (2, '{"findings": [{"references": []}], "cell": {}, "sample": 1}', ":3: no record"),
    ],
)
def test_damaged(tmp_path: Path, line: int, text: str, words: str) -> None:
    """A damaged journal ends in a traceback, or is overwritten."""
    path = written(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(StateError, match=words):
        Journal(tmp_path, HEADER, {})
    assert path.read_bytes() == before


def test_result_is_written_whole_or_not(tmp_path: Path) -> None:
    """A result without a journal is overwritten, or parts of one are left behind."""
    with Journal(tmp_path, HEADER, {}) as journal:
        assert journal.finish({"rows": [1]}) == tmp_path / RESULT
    assert json.loads((tmp_path / RESULT).read_text()) == {"rows": [1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL, RESULT]
    (tmp_path / JOURNAL).unlink()
    with pytest.raises(StateError, match=RESULT):
        Journal(tmp_path, HEADER, {})


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Two runs write into one journal at the same time."""
    with Journal(tmp_path, HEADER, {}), pytest.raises(StateError, match="another run") as caught:
        Journal(tmp_path, HEADER, {})
    assert "--out" in str(caught.value.hint)
    Journal(tmp_path, HEADER, {}).__exit__(None, None, None)


def test_in_memory() -> None:
    """Without a folder something is written."""
    with Journal(None, HEADER, {}) as journal:
        journal.add(record(0))
        assert journal.has(CELL, 0)
        assert journal.finish({}) is None
