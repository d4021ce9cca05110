"""Prefill and decode at each depth, beside llama.cpp's dense attention on the same loaded model: `actqkv bench`.

measure.py   what is run, in which order, and how a figure is made of samples
engines.py   our session and a llama.cpp context as two things that read, answer and go back
results.py   what came out: rows, as `bench --json` prints them
kernels.py   each kernel by itself, `actqkv bench --kernels`; kernel_jobs.py has the calls
report.py    the same as tables and words
figure.py    the same as curves
"""

from __future__ import annotations

from actqkv_cpp.bench.results import MemoryUse, Result, Row, StageUse

__all__ = ["MemoryUse", "Result", "Row", "StageUse"]
