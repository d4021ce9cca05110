"""What the engine tests share: tiny models as the engine sees them, sessions with every column, and all the bounds."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import tiny_gguf as tiny
from llama_cpp._internals import LlamaModel

from actqkv_cpp import Retrieval
from actqkv_cpp._native import Session
from actqkv_cpp.figures import Phase

N_VOCAB = 512
F32Array = npt.NDArray[np.float32]
Pieces = Sequence[tuple[int, Phase]]  # (tokens, phase) of one decode call after another

# Largest normalised mean square error, by what is compared: (bound, why; in brackets what is measured). Bounds are
# three to ten times the largest measured value.
BOUNDS: dict[str, tuple[float, str]] = {
    "dense F32": (5e-8, "sums in another order, and now and then another f16 of a key or value [1e-9 to 1e-8]"),
    "dense F16": (2e-6, "libllama multiplies other numbers of columns at once [3e-7]"),
    "dense BF16": (5e-5, "the same, activations in bf16 [9e-6]"),
    "dense Q8_0": (5e-5, "an activation now and then rounds to the next of 255 steps [8e-6]"),
    "dense Q4_0": (2e-4, "the same; activations are q8_0 here too [4e-5]"),
    "dense Q4_K_M": (5e-4, "activations in q8_K, one scale per 256"),
    "windows": (5e-8, "matrix products over other numbers of columns sum in another order [1e-9 to 1e-8]"),
    "mean": (1e-12, "f32 against f64: RoPE's angles and sums of a window [2e-13]"),
    "var": (3e-13, "the same; relative to variances of all channels [4e-14]"),
    "bias": (3e-13, "the same [3e-14]"),
    "weights": (2e-13, "the same [2e-14]"),
    "probe": (1e-10, "the same; larger angles where queries are rotated at their true positions [1.2e-11]"),
    "scores": (2e-8, "a summary now and then rounds to the other f16 [3e-9]"),
    "scores of spreads": (2e-5, "queries in 16 bits [1.1e-9]; a mean may now and then round to the other of 16 steps"),
    "votes of a search": (
        5e-4,
        "a cell's centre rounds to the other of 16 steps, or a query's channel of 127 [5.7e-5]",
    ),
    "votes of a search, median of steps": (1e-8, "both are rare, but such a cell stays for all steps [3e-13]"),
    "votes": (2e-8, "as scores; a difference of them and the logarithm of their sum"),
    "mass": (1e-6, "a rotated key now and then rounds to the other f16"),
    "entropy": (1e-8, "of 1 + h; the exponential of scores off by that much [1e-9]"),
    "out": (3e-7, "a rotated key now and then rounds to the other f16 [5e-8]"),
    "out q8_0": (2e-5, "the same, and then to the next of 255 steps [5.5e-6]"),
    "out q4_0": (2e-3, "the same, of 16 steps: two windows with such a key [4.9e-4], all others below [6.4e-6]"),
    "out, median of windows": (1e-8, "such a key is rare, but it moves a whole segment once it is turned [1.5e-9]"),
}

# Two chunks tie when their scores differ by less than this share of the standard deviation of all scores: one f16
# rounding (5e-4) in one of a summary's 64 channels or more moves a score by less.
TIE = 1e-4


def nmse(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(((a - b) ** 2).sum() / max((b**2).sum(), 1e-300))


def check(what: str, actual: npt.ArrayLike, expected: npt.ArrayLike, where: str = "") -> None:
    assert np.shape(actual) == np.shape(expected), f"{what} {where}"
    assert np.isfinite(np.asarray(actual)).all(), f"{what} {where}"
    error, bound = nmse(actual, expected), BOUNDS[what][0]
    assert error <= bound, f"{what} {where}: NMSE {error:.1e}, bound {bound:.0e}"


def random_tokens(n: int, seed: int = 0) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(tiny.FIRST_BYTE, N_VOCAB, n).astype(np.int32)


@contextmanager
def loaded(path: Path, n_gpu_layers: int = 0) -> Iterator[LlamaModel]:
    """A model as `Session` takes it; without extra buffer types, as everywhere in the tests (llama_oracle.py)."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    params.n_gpu_layers = n_gpu_layers
    model = LlamaModel(path_model=str(path), params=params, verbose=False)
    try:
        yield model
    finally:
        model.close()  # type: ignore[no-untyped-call]


def in_child(code: str, *, timeout: float | None = None) -> str:
    """What `code` prints as a process of its own, which may crash: it imports the tests' modules as they do here."""
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, os.environ["PYTHONPATH"])))},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


# A document of a few hundred tokens leaves chunks closed behind local, and several of them retrieved.
SMALL = Retrieval(n_sink=4, n_local=32, chunk=8, window=16, budget=4 + 32 + 5 * 8, positions="clamped")


def small(**columns: Any) -> Retrieval:
    return dataclasses.replace(SMALL, **columns)


def open_session(
    model: LlamaModel, retrieval: Retrieval = SMALL, *, n_ctx: int = 1024, n_threads: int = 1, kv_type: str = "f16"
) -> Session:
    return Session(model, retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type)


def stretch_bytes(n_keys: int, n_cells: int, d_head: int) -> int:
    """Of one KV head's stretch with room for so many: as native/kernels/cpu/cells.h says."""
    blocks = -(-n_cells // 16) * 16 * (4 * 4 + d_head // 2)
    keys = (n_keys + 15 * n_cells + 15) // 16 * 16 * (3 + d_head // 8)
    return -(-(64 + blocks + keys + 32) // 64) * 64


def divided_bytes(n_keys: int, d_head: int) -> int:
    return stretch_bytes(n_keys, n_keys // 64 + n_keys // 256 + 1, d_head)


def index_bytes(chunk: int, *, n_head_kv: int, d_head: int) -> int:
    """Of a layer's divided stretches, per chunk: as native/kv/stretches.h says."""
    numbers = [n_tokens // chunk for n_tokens in (65_536, 16_384, 4096, 1024) if n_tokens // chunk > 1]
    each = [-(-n_head_kv * divided_bytes(n * chunk, d_head) // n) for n in numbers]
    return -(-max(each) // 64) * 64


def rest_bytes(chunk: int, *, n_head_kv: int, d_head: int) -> int:
    """Of a layer: as many chunks as make no stretch, in order, a cell for every 32 keys of a chunk."""
    most = next(n // chunk for n in (1024, 4096) if n // chunk > 1) - 1
    return n_head_kv * stretch_bytes(most * chunk, most * -(-chunk // 32), d_head)


def one_by_one(n: int) -> list[tuple[int, Phase]]:
    """Calls that answer n tokens."""
    return [(1, "decode")] * n


def read(session: Session, tokens: npt.NDArray[np.int32], pieces: Pieces, *, n_logits: int | None = None) -> F32Array:
    """Feed `tokens` in calls of (length, phase); logits of every token, or of the last `n_logits` of each call."""
    rows, at = [], 0
    for n, phase in pieces:
        wanted = n if n_logits is None else min(n, n_logits)
        rows.append(session.decode(tokens[at : at + n], phase=phase, n_logits=wanted))
        at += n
    return np.concatenate(rows)
