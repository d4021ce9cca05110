"""Breaks when the logit rows that are kept are read at the wrong positions, or others are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest

from actqkv_cpp.rows import LogitRows

N_VOCAB = 7
ALL = np.random.default_rng(0).standard_normal((20, N_VOCAB)).astype(np.float32)


@pytest.fixture
def rows() -> LogitRows:
    """Rows 12 .. 19 of ALL, one by one."""
    found = LogitRows(N_VOCAB, n_tokens=12, keep_all=True)
    for i in range(12, 20):
        found.put(i, ALL[i : i + 1])
    return found


@pytest.fixture
def whole() -> LogitRows:
    """All rows of ALL, in two pieces."""
    found = LogitRows(N_VOCAB, keep_all=True)
    found.put(0, ALL[:13].copy())
    found.put(13, ALL[13:])
    return found


KEYS: list[Any] = [
    15, -1, np.int64(-3), (19, 4), (15, slice(None)), (-1, slice(2, 5)), slice(13, None), slice(-4, -1),
    (slice(13, 17), slice(None)), (slice(14, 20), 3), slice(12, None, 3), slice(None, 12, -2), slice(5, 5),
    [13, -1, 13], np.array([19, 12]), ([13, 14], [0, 6]), np.arange(20) > 14, (np.arange(20) > 14, 2), [],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indices(rows: LogitRows, key: Any) -> None:
    """Breaks when an index gives another row than in the whole matrix, or something that is no plain array."""
    expected = ALL[np.array(key, int) if key == [] else key] if isinstance(key, list) else ALL[key]
    found = rows[key]
    assert np.array_equal(found, expected)
    assert type(found) is type(expected)


@pytest.mark.parametrize("key", [..., None, (..., 3), slice(None), slice(None, None, -1), np.ones((20, N_VOCAB), bool)])
def test_whole_matrix(whole: LogitRows, key: Any) -> None:
    """Breaks when the whole of it is not an array as llama_cpp's is."""
    assert np.array_equal(whole[key], ALL[key])
    assert np.array_equal(np.array(whole), ALL)
    assert np.asarray(whole, np.float64).dtype == np.float64
    assert np.array_equal(list(whole), list(ALL))
    assert (len(whole), whole.shape, whole.dtype) == (20, ALL.shape, ALL.dtype)
    found = llama_cpp.Llama.logits_to_logprobs(whole)  # type: ignore[arg-type]
    assert np.array_equal(found, llama_cpp.Llama.logits_to_logprobs(ALL))


@pytest.mark.parametrize(
    "take",
    [
        lambda rows: rows[3],
        lambda rows: rows[3, :],
        lambda rows: rows[-9],
        lambda rows: rows[:20, :],
        lambda rows: rows[11:],
        lambda rows: rows[::-1],
        lambda rows: rows[[0]],
        lambda rows: rows[[19, 11]],
        lambda rows: rows[...],
        np.array,
        np.asarray,
        list,
        llama_cpp.Llama.logits_to_logprobs,
    ],
)
def test_absent_rows_are_not_made_up(rows: LogitRows, take: Callable[[LogitRows], object]) -> None:
    """Breaks when rows that were not kept look like logits, or are left out of a slice without a word."""
    with pytest.raises(IndexError, match=r"was not kept, kept: the last 8 of 20; .*logits_all=True"):
        take(rows)


@pytest.mark.parametrize("key", [20, -21, [20], [-21]])
def test_rows_that_are_not_there(rows: LogitRows, key: Any) -> None:
    """Breaks when an index beyond the tokens gives another row."""
    with pytest.raises(IndexError, match="20"):
        rows[key]


def test_truncate_and_replace(rows: LogitRows) -> None:
    """Breaks when rows of forgotten tokens come back."""
    rows.truncate(15)
    assert len(rows) == 15
    rows.put(15, ALL[:1])
    assert np.array_equal(rows[15, :], ALL[0])
    assert np.array_equal(rows[14, :], ALL[14])
    rows.put(17, ALL[17:18])  # a gap: only the unbroken end is kept
    assert (len(rows), len(rows.kept())) == (18, 1)
    rows.truncate(3)
    assert (len(rows), len(rows.kept())) == (3, 0)
    rows.put(3, ALL[:2])
    rows.truncate(9)  # an interrupted reading: the last row is of none of its tokens
    assert (len(rows), len(rows.kept())) == (9, 0)


def test_last_row_alone() -> None:
    """Breaks when rows pile up that nobody asked for."""
    rows = LogitRows(N_VOCAB, keep_all=False)
    for i in range(4):
        rows.put(i, ALL[i : i + 1])
    assert len(rows.kept()) == 1
    assert np.array_equal(rows[-1], ALL[3])
