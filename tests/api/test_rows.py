"""Breaks when the few logit rows kept are read at the wrong positions."""

from __future__ import annotations

import pickle

import llama_cpp
import numpy as np
import pytest

from actqkv_cpp.rows import LogitRows, Rows

N_VOCAB = 7
ALL = np.random.default_rng(0).standard_normal((20, N_VOCAB)).astype(np.float32)


@pytest.fixture
def rows() -> LogitRows:
    """Rows 12 .. 19 of ALL, in two pieces."""
    found = LogitRows(N_VOCAB)
    found.put(12, ALL[12:13], keep=False)
    for i in range(13, 20):
        found.put(i, ALL[i : i + 1], keep=True)
    return found


def test_reads_like_the_whole_matrix(rows: LogitRows) -> None:
    """Breaks when an index that llama_cpp uses gives another row."""
    assert rows.shape == ALL.shape
    n_tokens = 20
    scores = rows[:n_tokens, :]
    for key in ((15, slice(None)), (-1, slice(None)), (-3, slice(None)), (19, 4)):
        assert np.array_equal(scores[key], ALL[key])
        assert np.array_equal(rows[key], ALL[key])
    assert np.array_equal(scores[13:], ALL[13:])
    assert np.array_equal(scores[13:17, :], ALL[13:17])
    assert np.array_equal(list(scores[14:]), list(ALL[14:]))
    assert rows[:17, :][-1, :].tolist() == ALL[16].tolist()


def test_log_softmax_keeps_positions(rows: LogitRows) -> None:
    """Breaks when logprobs of a completion are those of other tokens."""
    found = llama_cpp.Llama.logits_to_logprobs(rows[:20, :])[14:]
    assert np.allclose(found, llama_cpp.Llama.logits_to_logprobs(ALL)[14:])


def test_absent_rows_are_not_made_up(rows: LogitRows) -> None:
    """Breaks when logits that were not kept look like logits."""
    assert np.isnan(rows[3, :]).all()
    assert np.isnan(rows[:20, :][11, :]).all()
    assert len(rows[:20, :]) == 8
    assert len(rows[:5, :]) == 0
    for beyond in (20, -21):
        with pytest.raises(IndexError):
            rows[beyond, :]


def test_truncate_and_replace(rows: LogitRows) -> None:
    """Breaks when rows of forgotten tokens come back."""
    rows.truncate(15)
    assert rows.end == 15
    assert rows.last() is not None
    rows.put(15, ALL[:1], keep=True)
    assert np.array_equal(rows[15, :], ALL[0])
    assert np.array_equal(rows[14, :], ALL[14])
    rows.put(17, ALL[17:18], keep=True)  # a gap: only the unbroken end is kept
    assert np.isnan(rows[15, :]).all()
    assert rows.end == 18
    rows.truncate(3)
    assert rows.last() is None


def test_pickle(rows: LogitRows) -> None:
    """Breaks when a saved state loses the positions of its rows."""
    copy = pickle.loads(pickle.dumps(rows.view()))
    assert isinstance(copy, Rows)
    assert np.array_equal(copy[15, :], ALL[15])
