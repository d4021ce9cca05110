"""Logits of the tokens read, as `Llama.scores` shows them.

llama_cpp.Llama keeps an array of n_ctx x n_vocab, which only logits_all fills. Here rows are kept as they come: of all
tokens with logits_all, else of the last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class LogitRows:
    """A matrix of a row per token read [n_tokens, n_vocab], of which an unbroken stretch up to the last row is kept.

    It is indexed as an array is, by rows counted from the first token, negative ones from the end, and gives plain
    arrays; np.asarray takes all of it.

    Args:
        n_vocab: columns.
        n_tokens: read before, whose rows are not kept.
        keep_all: every row that comes is kept; otherwise the last one.

    Raises:
        IndexError: a row that is asked for, by itself or in a slice, is not there or not kept.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, n_vocab: int, *, n_tokens: int = 0, keep_all: bool) -> None:
        self._keep_all = keep_all
        self._first = n_tokens
        self._n = 0
        self._rows: NDArray[np.float32] = np.empty((0, n_vocab), np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._rows.shape[1]

    def put(self, start: int, rows: NDArray[np.float32]) -> None:
        """Rows of tokens `start` on, up to the last one read; earlier rows stay where all are kept up to `start`."""
        if not self._keep_all or start != len(self) or self._n == 0:
            self._first, self._n, self._rows = start, len(rows), rows
            return
        if self._n + len(rows) > len(self._rows):  # grow by doubling: one row arrives per generated token
            grown = np.empty((2 * (self._n + len(rows)), self._rows.shape[1]), np.float32)
            grown[: self._n] = self._rows[: self._n]
            self._rows = grown
        self._rows[self._n : self._n + len(rows)] = rows
        self._n += len(rows)

    def truncate(self, n_tokens: int) -> None:
        """Forget the rows of tokens `n_tokens` on; all rows, where more tokens were read than rows came."""
        self._n = min(max(n_tokens - self._first, 0), self._n) if n_tokens <= len(self) else 0
        self._first = n_tokens - self._n

    def kept(self) -> NDArray[np.float32]:
        """The rows that are kept [n, n_vocab]: the last one is of the last token."""
        return self._rows[: self._n]

    def __len__(self) -> int:
        return self._first + self._n

    def __getitem__(self, key: Any) -> Any:
        row, *columns = key if isinstance(key, tuple) and key else (key,)
        place: Any  # of the rows among those that are kept
        if isinstance(row, (int, np.integer)):
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} of the logits of {len(self)} tokens")
            place = self._check(int(row) % len(self)) - self._first
        elif isinstance(row, slice) and row.step in (None, 1):
            wanted = range(len(self))[row]
            first = self._check(wanted[0]) - self._first if wanted else 0
            place = slice(first, first + len(wanted))
        elif isinstance(row, slice) or np.ndim(row) == 1:
            places = np.arange(len(self))[row]
            self._check(int(places.min(initial=len(self))))
            place = places - self._first
        else:
            return self[:][key]
        index = (place, *columns)
        return self.kept()[index]

    def __iter__(self) -> Any:
        return iter(self[:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self[:], dtype, copy=copy)

    def _check(self, first: int) -> int:
        """`first`, the first row that is asked for; IndexError where it is not kept."""
        if first < self._first:
            raise IndexError(
                f"row {first} of the logits was not kept, kept: the last {self._n} of {len(self)}; "
                "make the Llama with logits_all=True, and eval() the tokens with it"
            )
        return first
