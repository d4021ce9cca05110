"""Plain NumPy float64 versions of native/kernels/kernels.h, written from docs/algorithms.md. Slow and obvious."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


# ---- rows: f16; q8_0 and q4_0, blocks of 32 values with a scale in f16, from their definitions

BLOCK = 32
Bytes = npt.NDArray[np.uint8]


def store_rows(kv_type: str, x: npt.NDArray[np.float16]) -> Bytes:
    """x [..., d] as bytes [..., row]. In float32 where the definition computes: the bytes are to be equal."""
    if kv_type == "f16":
        return np.ascontiguousarray(x).view(np.uint8)
    n_missing = -x.shape[-1] % BLOCK
    padded = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, n_missing)])
    blocks = padded.reshape(*x.shape[:-1], -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    scale = np.abs(extreme) / np.float32(127) if kv_type == "q8_0" else extreme / np.float32(-8)
    steps = blocks * np.where(scale != 0, np.float32(1) / np.where(scale != 0, scale, 1), 0).astype(np.float32)
    if kv_type == "q8_0":  # halves away from zero
        steps = steps.astype(np.float64)
        packed = (np.sign(steps) * np.floor(np.abs(steps) + 0.5)).astype(np.int8).view(np.uint8)
    else:
        q = np.minimum(np.floor(steps + np.float32(8.5)), 15).astype(np.uint8)
        packed = q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4
    scales = np.ascontiguousarray(scale.astype(np.float16)).view(np.uint8)
    raw = np.concatenate([scales, packed], axis=-1)
    return np.ascontiguousarray(raw.reshape(*x.shape[:-1], -1))


def load_rows(kv_type: str, raw: Bytes, d: int) -> Array:
    """[..., row] back to [..., d]."""
    if kv_type == "f16":
        return raw.view(np.float16).astype(np.float64)
    blocks = raw.reshape(*raw.shape[:-1], -1, 2 + (BLOCK if kv_type == "q8_0" else BLOCK // 2))
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    q = blocks[..., 2:]
    if kv_type == "q8_0":
        steps = q.view(np.int8).astype(np.float64)
    else:
        steps = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.float64) - 8
    return np.asarray((scale * steps).reshape(*raw.shape[:-1], -1)[..., :d])


def turn(x: Array) -> Array:
    """x [..., n] by Sylvester's Hadamard matrices, in segments of the largest power of two in n, 256 at most."""
    p = min(x.shape[-1] & -x.shape[-1], 256)
    matrix = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(p)] for i in range(p)]) / np.sqrt(p)
    return np.asarray((x.reshape(*x.shape[:-1], -1, p) @ matrix).reshape(x.shape))


# ---- probe (3.1, 3.2)


@dataclass
class Running:
    mean: Array
    var: Array
    n_tokens: float = 0
    n_windows: int = 0


def probe_update(run: Running, z: Array, *, published: bool, cap: int) -> Running:
    m = len(z)
    u, v = z.mean(axis=0), z.var(axis=0)
    if run.n_windows == 0:
        first = np.zeros_like(v) if m == 1 else v * m / (m - 1)
        mean, var = u, first if published else v
    elif published:
        t, delta = min(run.n_windows, cap), u - run.mean
        var = (run.var * (t - 1 / m) + v + delta**2 / (1 + 1 / t)) / (t + 1 - 1 / m)
        mean = (run.mean * t + u) / (t + 1)
    else:
        n, delta = min(run.n_tokens, cap * 256), u - run.mean
        var = (n * run.var + m * v + delta**2 * n * m / (n + m)) / (n + m)
        mean = run.mean + delta * m / (n + m)
    return Running(mean, var, min(run.n_tokens + m, cap * 256), run.n_windows + 1)


def probe_weights(run: Running, z: Array) -> tuple[Array, Array]:
    m, mean_var = len(z), run.var.mean()
    if not (np.isfinite(mean_var) and mean_var > 0):
        return np.zeros(m), np.full(m, 1 / m)
    bias = ((z - run.mean) ** 2 / (run.var + mean_var / 100)).mean(axis=1)
    total = bias.sum()
    return bias, bias / total if np.isfinite(total) and total > 0 else np.full(m, 1 / m)


# ---- summarize (3.3)

HEAD, KV_HEAD, MEAN, BOUNDS = 0, 1, 2, 3  # enum actqkv_summary


def summarize(kind: int, n_representatives: int, keys: Array, sums: Array) -> tuple[Array, float]:
    """keys [G][c][d], sums [H][c]; rep [H or G][d] and its length as it meets the probe.

    Of bounds, rep is [2G][d]: the least of each channel per KV head, then the greatest (section 4).
    """
    if kind == BOUNDS:
        return np.concatenate([keys.min(axis=1), keys.max(axis=1)]), 0.0
    n_head, n_head_kv = len(sums), len(keys)
    r = n_head // n_head_kv
    sums = np.where(np.isfinite(sums), sums, 0)
    if kind == HEAD:
        keys = np.repeat(keys, r, axis=0)
    else:
        sums = sums.reshape(n_head_kv, r, -1).sum(axis=1)
    rep = []
    for k, s in zip(keys, sums, strict=True):
        order = np.argsort(-s, kind="stable")[:n_representatives]
        enough = kind != MEAN and n_representatives < len(k) and np.all(s[order] > 0)
        rep.append(k[order].mean(axis=0) if enough else k.mean(axis=0))
    rounded = np.asarray(rep).astype(np.float16).astype(np.float64)
    return np.asarray(rep), float(np.sqrt((rounded**2).sum() * (1 if kind == HEAD else r)))


# ---- score, cut-off (3.4 to 3.6)


def score(probe: Array, reps: Array, norms: Array | None, probe_norm: float, scale: float) -> Array:
    dot = scale * (reps @ probe)
    if norms is None:
        return np.asarray(dot)
    divisor = norms * probe_norm
    usable = (divisor > 0) & np.isfinite(divisor)
    return np.where(usable, dot / np.where(usable, divisor, 1), 0)


def head_scores(queries: Array, reps: Array) -> Array:
    """queries [H, w], reps [blocks, n, w] -> [H, n]."""
    per_head = np.repeat(reps, len(queries) // len(reps), axis=0)
    return np.asarray(np.einsum("hw,hnw->hn", queries, per_head))


def vote(scores: Array, n_head_kv: int, *, by_sum: bool) -> Array:
    """[H, n] -> [G, n]: logarithms of the greatest softmax over chunks of a group's heads, or of their sum."""
    most = scores.max(axis=1, keepdims=True)
    logs = scores - most - np.log(np.exp(scores - most).sum(axis=1, keepdims=True))
    groups = logs.reshape(n_head_kv, -1, scores.shape[1])
    return np.asarray(np.logaddexp.reduce(groups, axis=1) if by_sum else groups.max(axis=1))


def refine(query: Array, keys: Array) -> Array:
    """The best q.k per query head and chunk: query [H, d], keys [n, G, c, d] -> [H, n]."""
    n_group = len(query) // keys.shape[1]
    dots = np.einsum("hd,nhcd->hnc", query, np.repeat(keys, n_group, axis=1))
    return np.asarray(dots.max(axis=2))


# ---- cells and search: of the engine's own making (native/kernels/cpu/cells.cpp and search.cpp say what they are)

CELL_KEYS, CELL_KEYS_MOST, RUN = 64, 256, 32
LEAST = 1.0  # of the mean weight, that counts
REACH = 3  # deviations from a centre that a cell's keys are taken to reach


@dataclass
class Stretch:
    """One KV head's stretch as its bytes have it (native/kernels/cpu/cells.h); keys in the order of their cells."""

    starts: npt.NDArray[np.int64]  # [cells + 1]
    reaches: Array  # [cells]
    centres: Array  # [cells, d], turned, less what all keys have in common
    sizes: Array  # [keys]
    units: Array  # [keys], of the sizes of their cell
    chunks: npt.NDArray[np.int64]  # [keys]
    signs: Array  # [keys, d], 1 or -1

    @property
    def cells(self) -> npt.NDArray[np.int64]:
        """The cell of each key."""
        return np.repeat(np.arange(len(self.reaches)), np.diff(self.starts))

    @property
    def keys(self) -> Array:
        """As sketches have them: turned, less what is common."""
        return np.asarray(self.centres[self.cells] + self.sizes[:, None] * self.signs)


def stretch(raw: Bytes, d: int, n_keys: int, *, in_order: int = 0) -> Stretch:
    """in_order: 0 where it is divided; else the keys of a chunk, and n_keys is for how many it has room."""
    n_of_chunk = -(-in_order // RUN)
    n_most = n_keys // in_order * n_of_chunk if in_order else n_keys // CELL_KEYS + n_keys // CELL_KEYS_MOST + 1
    n_cells, counted = raw[:8].view(np.uint32)
    assert counted == (n_cells // n_of_chunk * in_order if in_order else n_keys)
    assert 1 <= n_cells <= n_most
    assert not raw[8:64].any()
    n_blocks = -(-n_most // 16)
    widths = [64, 64, 8 * d, 64, 64]
    blocks = raw[64 : 64 + n_blocks * sum(widths)].reshape(n_blocks, -1)
    parts = [np.ascontiguousarray(part) for part in np.split(blocks, np.cumsum(widths)[:-1], axis=1)]
    steps, reaches, units = (parts[i].view(np.float32).ravel()[:n_cells].astype(np.float64) for i in (0, 1, 3))
    places = parts[4].view(np.uint32).ravel()[:n_cells].astype(np.int64)
    pairs = parts[2].reshape(n_blocks, d // 8, 16, 4)
    fours = np.stack([pairs & 15, pairs >> 4], axis=3).astype(np.float64) - 8
    wholes = fours.transpose(0, 2, 1, 3, 4).reshape(n_blocks * 16, d)[:n_cells]
    counts, at, firsts = places % 256 + 1, 64 + n_blocks * sum(widths), places // 256
    sizes, chunks, signs = [], [], []
    for first, n, unit in zip(firsts, counts, units, strict=True):
        m = -(-n // 16) * 16
        keys = raw[at + first * 16 * (3 + d // 8) :][: m * (3 + d // 8)]
        sizes.append(unit * keys[:n])
        chunks.append(np.ascontiguousarray(keys[m : 3 * m]).view(np.uint16)[:n])
        bits = np.unpackbits(keys[3 * m :].reshape(d // 8, m, 1), axis=2, bitorder="little")
        signs.append(bits.transpose(1, 0, 2).reshape(m, d)[:n])
        assert not keys[n:m].any()
        assert not bits[:, n:].any()
    np.testing.assert_array_equal(firsts, np.cumsum([0, *(-(-counts // 16))])[:-1])
    return Stretch(
        np.cumsum([0, *counts]),
        reaches,
        wholes * steps[:, None],
        np.concatenate(sizes),
        np.repeat(units, counts),
        np.concatenate(chunks).astype(np.int64),
        2.0 * np.concatenate(signs) - 1,
    )


def cell_of_each(keys: Array) -> npt.NDArray[np.int64]:
    """Cells of a divided stretch of keys [n, d]: of those nearest to one of n / 64 of them, 256 at most."""
    seeds = keys[:: max(1, len(keys) // max(1, len(keys) // CELL_KEYS))][: max(1, len(keys) // CELL_KEYS)]
    nearest = (keys @ seeds.T - (seeds**2).sum(axis=1) / 2).argmax(axis=1)
    found, n_cells = np.zeros(len(keys), np.int64), 0
    for own in (np.flatnonzero(nearest == i) for i in range(len(seeds))):
        for part in np.array_split(own, -(-len(own) // CELL_KEYS_MOST)) if len(own) else []:
            found[part] = n_cells
            n_cells += 1
    return found


def write_stretch(keys: Array, common: Array, *, divided: bool) -> Bytes:
    """What `stretch` reads, of turned keys [chunks, c, d]; full where it is in order."""
    n, c, d = keys.shape
    flat, chunk_of = keys.reshape(n * c, d) - common, np.repeat(np.arange(n), c)
    runs = chunk_of * -(-c // RUN) + np.tile(np.arange(c) // RUN, n)
    cells = cell_of_each(flat) if divided else runs
    n_cells, n_most = cells.max() + 1, n * c // CELL_KEYS + n * c // CELL_KEYS_MOST + 1 if divided else n * -(-c // RUN)
    n_padded = -(-n_most // 16) * 16
    steps, reaches, units = (np.zeros(n_padded, np.float32) for _ in range(3))
    places, fours, rows = np.zeros(n_padded, np.uint32), np.zeros((n_padded, d), np.uint8), []
    for i in range(n_cells):
        own = np.flatnonzero(cells == i)
        mean, n_own, m = flat[own].mean(axis=0), len(own), -(-len(own) // 16) * 16
        steps[i] = mean[np.abs(mean).argmax()] / -8
        fours[i] = np.floor(mean / steps[i] + 8.5).clip(0, 15)
        rest = flat[own] - steps[i].astype(np.float64) * (fours[i].astype(np.float64) - 8)
        reaches[i], sizes = np.sqrt((rest**2).mean()), np.abs(rest).mean(axis=1)
        units[i] = sizes.max() / 255
        places[i] = 256 * sum(len(row) for row in rows) // (16 * (3 + d // 8)) + n_own - 1
        found = np.zeros((3 + d // 8, m), np.uint8)
        found[0, :n_own] = np.rint(sizes / units[i]).clip(0, 255)
        found[1:3].reshape(-1).view(np.uint16)[:n_own] = chunk_of[own]
        found[3:, :n_own] = np.packbits(rest >= 0, axis=1, bitorder="little").T
        rows.append(found.reshape(-1))
    pairs = fours.reshape(-1, 16, d // 8, 2, 4).transpose(0, 2, 1, 3, 4)
    centres = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).reshape(len(pairs), -1)
    parts = [part.reshape(len(pairs), 16).view(np.uint8) for part in (steps, reaches, units, places)]
    blocks = np.concatenate([*parts[:2], centres, *parts[2:]], axis=1).reshape(-1)
    head = np.array([n_cells, n * c, *[0] * 14], np.uint32).view(np.uint8)
    return np.concatenate([head, blocks, *rows, np.zeros(15 * 16 * (3 + d // 8) + 32, np.uint8)])


def rounded_centres(means: Array) -> Array:
    """Means [cells, d] in 16 whole steps of their own, of which the largest magnitude is the -8th."""
    extreme = np.take_along_axis(means, np.abs(means).argmax(axis=1)[:, None], axis=1)
    steps = extreme / -8
    wholes = np.floor(np.divide(means, steps, out=np.zeros_like(means), where=steps != 0) + 8.5).clip(0, 15) - 8
    return np.asarray(wholes * steps)


def cell_scores(query: Array, stretches: list[Stretch]) -> Array:
    """What keys of each cell may reach: turned query [H, d] against stretches of its KV head -> [H, cells]."""
    products = [query @ s.centres.T + REACH * np.linalg.norm(query, axis=1)[:, None] * s.reaches for s in stretches]
    return np.concatenate(products, axis=1)


# ---- spread: of the engine's own making (native/kernels/cpu/spread.cpp says what it is)


def spread(keys: Array, centre: Array) -> tuple[Array, Array]:
    """Keys [n, G, c, d] of chunks, centre [G, d]: means turned and less the centre [n, G, d], before they are rounded,
    and how far keys spread around them [n, G]."""
    mean = keys.mean(axis=2, keepdims=True)
    square = ((keys - mean) ** 2).mean(axis=(2, 3))
    return turn(mean[:, :, 0] - centre), np.sqrt(square)


def spread_scores(query: Array, means: Array, spreads: Array) -> Array:
    """query [H, d] as keys meet it, turned means [n, G, d], spreads [n, G] -> [n]: the best product with a corner of
    the box of half-width s around the mean, added up over heads."""
    turned, r = turn(query), len(query) // means.shape[1]
    corners = np.repeat(means, r, axis=1) + np.repeat(spreads, r, axis=1)[:, :, None] * np.sign(turned)
    return np.asarray(np.einsum("hd,nhd->n", turned, corners))


def entropy(scores: Array, temperature: float) -> float:
    if len(scores) <= 1 or temperature <= 0 or not np.all(np.isfinite(scores)):
        return 0.0
    p = softmax(scores / temperature)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum() / np.log(len(p)))


def top_k(scores: Array, k: int) -> npt.NDArray[np.int64]:
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    order = np.concatenate([order[~np.isnan(scores[order])], order[np.isnan(scores[order])]])
    return np.sort(order[:k])


# ---- attend (1, 2)


@dataclass
class Span:
    """far, near: [G][n][d] or None. first: position of the first token. turned: met by queries of their own."""

    far: Array | None
    near: Array | None
    v: Array
    first: int
    turned: bool = False

    @property
    def n_tok(self) -> int:
        return int(self.v.shape[1])


def attend(
    spans: list[Span],
    queries: tuple[Array, Array, Array],
    k_window: Array,
    v_window: Array,
    *,
    n_past: int,
    n_clamp: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """queries near, far and turned [m][H][d], window K and V [G][m][d].

    Returns out [m][H][d], weight sums over queries [H][keys], span mass.
    """
    q_near, q_far, q_turned = queries
    m, n_head, _ = q_near.shape
    r = n_head // len(k_window)
    out = np.zeros_like(q_near)
    column_sums = np.zeros((n_head, sum(s.n_tok for s in spans) + m))
    for h in range(n_head):
        g = h // r
        v = np.concatenate([s.v[g] for s in spans] + [v_window[g]])
        for i in range(m):
            logits = []
            for s in spans:
                distance = n_past + i - (s.first + np.arange(s.n_tok))
                near = np.full(s.n_tok, s.far is None) if s.near is None or s.far is None else distance < n_clamp
                of_near, of_far = (q_turned, q_turned) if s.turned else (q_near, q_far)
                a = of_near[i, h] @ s.near[g].T if s.near is not None else np.zeros(s.n_tok)
                b = of_far[i, h] @ s.far[g].T if s.far is not None else np.zeros(s.n_tok)
                logits.append(np.where(near, a, b))
            window = k_window[g] @ q_near[i, h]
            logits.append(np.where(np.arange(m) <= i, window, -np.inf))
            w = softmax(scale * np.concatenate(logits))
            out[i, h] = w @ v
            column_sums[h] += w
    ends = np.cumsum([0] + [s.n_tok for s in spans])
    per_key = column_sums.mean(axis=0)
    mass = np.array([per_key[a:b].sum() for a, b in itertools.pairwise(ends)])
    return out, column_sums, mass
