"""The oracle of a search by the index of keys, in NumPy float64 as reference.py is, and with its shapes.

The index is of the engine's own making, no part of the papers: native/kernels/cpu/cells.cpp and search.cpp say what it
is. Which keys share a cell is the engine's choice; here is what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from reference import Floats, Ints, softmax, turned

N_UNDIVIDED_TOKENS = 1024  # of closed chunks: the keys of fewer stay in order, and all are looked at
N_RUN = 32  # of a chunk's keys, in order, that are a cell


@dataclass(frozen=True)
class Cell:
    """Turned keys around one centre, as sketches have them: what is common taken off, signs of one size for each."""

    centre: Floats  # [G, d]
    unit: Floats  # [G] of sizes
    sizes: Floats  # [n, G] in whole units
    signs: Floats  # [n, G, d]


def sketched(keys: Floats, common: Floats) -> Cell:
    """Turned keys [n, G, d] around their mean less what is common [G, d], in 16 steps; the greatest has 255 units."""
    keys = keys - common
    mean = keys.mean(axis=0)
    step = np.take_along_axis(mean, np.abs(mean).argmax(axis=1)[:, None], axis=1) / -8
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    centre = step * (np.floor(mean * inverse + 8.5).clip(0, 15) - 8)
    rest = keys - centre
    sizes = np.abs(rest).mean(axis=2)
    unit: Floats = sizes.max(axis=0) / 255
    whole = np.floor(np.divide(sizes, unit, out=np.zeros_like(sizes), where=unit > 0) + 0.5)
    return Cell(centre, unit, whole, np.where(rest < 0, -1.0, 1.0))


def in_127ths(query: Floats) -> Floats:
    """A query [H, d] as it meets centres: in whole 127ths of its greatest channel."""
    step = np.abs(query).max(axis=1, keepdims=True) / 127
    rounded: Floats = np.rint(query / step) * step
    return rounded


def cell_logits(query: Floats, cell: Cell) -> Floats:
    """Logits [H, n] of a turned and scaled query [H, d]. What four channels of it give is rounded to 1/63 of the most
    that any four can; its sum times a size to 256 of the sizes' units."""
    n_group = len(query) // len(cell.centre)
    fours = query.reshape(len(query), -1, 4)
    unit = np.abs(fours).sum(axis=2).max(axis=1) / 63
    signs = np.repeat(cell.signs, n_group, axis=1).reshape(len(cell.signs), *fours.shape)
    sums = np.rint(np.einsum("hpe,jhpe->jhp", fours, signs) / unit[:, None]).sum(axis=2)
    products = np.floor((sums * np.repeat(cell.sizes, n_group, axis=1) + 128) / 256)
    base = (in_127ths(query) * np.repeat(cell.centre, n_group, axis=0)).sum(axis=1)
    logits: Floats = (base + 256 * np.repeat(cell.unit, n_group) * unit * products).T
    return logits


def cell_votes(query: Floats, cells: Sequence[Cell], chunks: Ints, n_chunks: int) -> Floats:
    """Votes [n_chunks], summed over query heads: what attention the keys of each chunk would have among all keys of the
    cells, but for keys of less than the mean; chunks: of all keys."""
    weights = softmax(np.concatenate([cell_logits(query, cell) for cell in cells], axis=1))
    weights[weights < 1 / weights.shape[1]] = 0  # hardly count
    votes: Floats = np.bincount(chunks, weights.sum(axis=0), minlength=n_chunks)
    return votes


def search_votes(query: Floats, keys: Sequence[Floats], common: Floats) -> Floats:
    """Votes [N] of chunks' keys [c, G, d] in order; query [H, d] as it meets keys, scaled, and what keys have in common
    [G, d], taken off means."""
    cells = [
        sketched(run, turned(common))
        for chunk in map(turned, keys)
        for run in np.split(chunk, range(N_RUN, len(chunk), N_RUN))
    ]
    chunks = np.repeat(np.arange(len(keys)), [len(chunk) for chunk in keys])
    return cell_votes(turned(query), cells, chunks, len(keys))
