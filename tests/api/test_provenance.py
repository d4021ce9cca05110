"""Breaks when a figure cannot be traced to what it was measured on."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

import actqkv_cpp
from actqkv_cpp import provenance

EPYC = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (EPYC.format(0, 17) + EPYC.format(1, 17), "AMD EPYC (family 25, model 17)"),
        (EPYC.format(0, 1), "AMD EPYC (family 25, model 1)"),
        ("processor\t: 0\nmodel name\t: a CPU: the first\n", "a CPU: the first"),
        (ARM, None),
        (None, None),
    ],
)
def test_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, name: str | None) -> None:
    """Two generations of one brand look the same, or a system that tells less ends in a traceback."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(provenance, "_CPU_INFO", tmp_path / "cpuinfo")
    found = provenance.describe_machine(n_threads=1)["cpu"]
    assert found == name if name else found


def test_run() -> None:
    """A result does not say which actqkv measured it, or when, or gives a time of an unknown zone."""
    run = provenance.describe_run()
    assert run["version"] == actqkv_cpp.__version__
    offset = datetime.fromisoformat(run["started"]).utcoffset()
    assert offset is not None
    assert offset.total_seconds() == 0
    assert run["commit"] is None or len(run["commit"].rstrip("+")) == 40
