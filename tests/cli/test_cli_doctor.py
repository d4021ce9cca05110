"""Breaks when `actqkv doctor` does not say what is installed, or its exit status does not."""

from __future__ import annotations

import json
import sys

import pytest
import typer
from cli_support import Actqkv

from actqkv_cpp import doctor
from actqkv_cpp.__main__ import main
from actqkv_cpp.doctor import Finding


def test_lines_for_people(actqkv: Actqkv) -> None:
    """A line per finding, its state first."""
    found = actqkv("doctor")
    assert found.status == 0, found.err
    lines = [line for line in found.out.splitlines() if not line.lstrip().startswith("->")]
    assert {line.split()[0] for line in lines} <= {"ok", "unused"}
    assert any("llama-cpp-python" in line for line in lines)


def test_json(actqkv: Actqkv) -> None:
    """The same findings for programs."""
    found = json.loads(actqkv("doctor", "--json").out)
    assert found["runs"] is True
    assert {"what", "state", "text", "remedy"} == set(found["findings"][0])
    assert {"processor", "llama-cpp-python", "CUDA kernels", "in use"} <= {one["what"] for one in found["findings"]}


def test_what_is_broken_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that runs doctor first must not go on."""
    broken = Finding("llama-cpp-python", "broken", "not installed", "pip install llama-cpp-python")
    monkeypatch.setattr(doctor, "diagnose", lambda: [broken])
    monkeypatch.setattr(sys, "argv", ["actqkv", "doctor"])
    with pytest.raises((SystemExit, typer.Exit)) as ended:
        main()
    assert getattr(ended.value, "code", getattr(ended.value, "exit_code", None)) == 1
    out = capsys.readouterr().out
    assert "broken  llama-cpp-python  not installed" in out
    assert "-> pip install llama-cpp-python" in out
