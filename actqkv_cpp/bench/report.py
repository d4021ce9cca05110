"""A result as tables and words, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from actqkv_cpp import tables
from actqkv_cpp.bench.kernels import KernelResult
from actqkv_cpp.bench.measure import PREFILL_TOKENS
from actqkv_cpp.bench.results import EngineName, Phase, Result, Row, StageUse, Subject

_PHASES: tuple[Phase, ...] = ("prefill", "decode")
_PEERS: tuple[EngineName, ...] = ("llama.cpp", "other llama.cpp")
_HEADINGS = {"llama.cpp": "llama.cpp", "other llama.cpp": "other"}
_IDLE_LOAD = 0.5  # of a machine on which nothing else runs
_SMALL_SHARE = 0.005  # of a row's time: a stage that never takes more has no column


def render(result: Result, *, width: int) -> str:
    """Speeds with ratios, stages and memory as tables, then what was measured and what was not, in words."""
    parts: list[RenderableType] = [_heading(result)]
    for method in _methods(result.rows):
        parts += [table for make in (_speeds, _stages, _memory, _gpu) if (table := make(result, method))]
    return tables.to_text([*parts, *_words(result)], width=width)


def render_kernels(result: KernelResult, *, width: int) -> str:
    """A line per kernel with its roofline, then what was measured, in words."""
    machine, shape = result.machine, result.shape
    heading = (
        f"{shape.n_head} query heads, {shape.n_head_kv} KV heads of {shape.d_head}, {shape.kv_type} KV, "
        f"{shape.depth:,} tokens in chunks of {shape.chunk}, a budget of {shape.budget:,}\n"
        f"{machine['cpu']}, {machine['threads']} threads, {machine['kernels']}, load {machine['load_average']} at the "
        f"start: memory reads {machine['read_gb_per_s']} GB/s, products of matrices {machine['peak_gop_per_s']} "
        "Gop/s\n"
    )
    columns = ("kernel", "of", "ms", "least-most", "MB", "GB/s", "of memory", "Gop/s", "of peak")
    table = tables.table("one call, one layer", columns, n_left=2)
    for row in result.kernels:
        table.add_row(
            row.kernel,
            row.work,
            f"{row.ms:.3g}",
            f"{row.spread_ms[0]:.3g}-{row.spread_ms[1]:.3g}",
            f"{row.bytes / 1e6:.3g}",
            f"{row.gb_per_s:.1f}",
            f"{100 * row.read_share:.0f} %",
            f"{row.gop_per_s:.1f}",
            f"{100 * row.compute_share:.0f} %",
        )
    words = (
        f"Measured: medians of {result.kernels[0].n} samples; every call works on other data of "
        f"{result.working_set_bytes / 1e6:,.0f} MB, "
        f"{result.working_set_bytes // machine['last_level_cache_bytes']} times the last-level cache. "
        "Shares are of what memory gives when it is read in order, each byte once, and of the speed of matrix "
        "products; the greater one is what limits a kernel. Summarize, cells and cutoff run on one thread."
    )
    return tables.to_text([heading, table, words, *_busy(machine)], width=width)


def _heading(result: Result) -> str:
    machine, model = result.machine, result.model
    return (
        f"{model['name']}: {model['description']}, {model['bytes'] / 1e6:,.0f} MB\n"
        f"{machine['cpu']}, {machine['threads']} threads, {machine['kernels']}, "
        f"memory reads {machine['read_gb_per_s']} GB/s, load {machine['load_average']} at the start\n"
    )


def _speeds(result: Result, method: str) -> Table:
    """ours / llama.cpp is of one depth; ours / ours, of ours to itself at the least depth in the same minute."""
    rows = [row for row in result.rows if row.engine == "actqkv" and row.method == method]
    least = min(row.depth for row in rows)
    peers = _peers(result.rows)
    columns = ["phase", "depth", "tok/s", "ms/token", "least-most"]
    for peer in peers:
        name = _HEADINGS[peer.engine]
        columns += [f"{name}\n{peer.kv_type} tok/s", f"ours/\n{name}"]
    table = tables.table(f"method {method}, {rows[0].kv_type} KV", (*columns, f"ours/ours\nat {least:,}"))
    for phase in _PHASES:
        for row in sorted((row for row in rows if row.phase == phase), key=lambda row: row.depth):
            found = [result.find(peer, phase, row.depth) for peer in peers]
            table.add_row(
                row.phase,
                f"{row.depth:,}",
                _rate(row),
                f"{row.ms_per_token:.3g}",
                f"{row.spread_ms[0]:.3g}-{row.spread_ms[1]:.3g}" if row.measured else "",
                *(cell for peer in found for cell in _beside(row, peer)),
                f"{row.least_ms_per_token / row.ms_per_token:.2f}" if row.least_ms_per_token else "",
            )
    return table


def _beside(row: Row, peer: Row | None) -> tuple[str, str]:
    """A peer's speed, and ours over it."""
    return (_rate(peer), f"{peer.ms_per_token / row.ms_per_token:.2f}") if peer else ("", "")


def _stages(result: Result, method: str) -> Table | None:
    """ms and GB/s of each stage, at each depth."""
    rows = [row for row in result.rows if row.method == method and row.stages]
    if not rows:
        return None
    used = [row.stages for row in rows if row.stages]
    names = [name for name in used[0] if any(_share(stages, name) > _SMALL_SHARE for stages in used)]
    columns = [*names, "rest"]
    table = tables.table("where the time goes: microseconds per token (GB/s)", ("phase", "depth", *columns))
    for phase in _PHASES:
        for row in rows:
            if row.phase == phase and row.stages:
                rest = sum(stage.ms_per_token for name, stage in row.stages.items() if name not in names)
                cells = [_microseconds(row.stages[name]) for name in names]
                table.add_row(phase, f"{row.depth:,}", *cells, f"{1000 * rest:,.0f}")
    return table


def _share(stages: dict[str, StageUse], name: str) -> float:
    return stages[name].ms_per_token / (sum(stage.ms_per_token for stage in stages.values()) or 1.0)


def _microseconds(stage: StageUse) -> str:
    """Bytes over time say something where memory is what a stage waits for."""
    bandwidth = f" ({stage.gb_per_s:.1f})" if stage.gb_per_s >= 1 else ""
    return f"{1000 * stage.ms_per_token:,.0f}{bandwidth}"


def _memory(result: Result, method: str) -> Table | None:
    rows = [row for row in result.rows if row.method == method and row.memory and row.phase == "decode"]
    if not rows:
        return None
    table = tables.table("memory in MB", ("depth", "resident", "weights", "KV", "summaries", "resident/sum"))
    for row in rows:
        if use := row.memory:
            parts = (use.resident_bytes, use.weights_bytes, use.kv_bytes, use.summary_bytes)
            table.add_row(f"{row.depth:,}", *(f"{part / 1e6:,.0f}" for part in parts), f"{use.ratio:.2f}")
    return table


def _gpu(result: Result, method: str) -> Table | None:
    rows = [row for row in result.rows if row.method == method and row.gpu]
    if not rows:
        return None
    columns = ("hit rate", "stalls", "KB sent", "KB back", "ms waited", "MB there", "MB pinned")
    table = tables.table("attention on the GPU, per token", ("phase", "depth", *columns))
    for row in rows:
        if use := row.gpu:
            table.add_row(
                row.phase,
                f"{row.depth:,}",
                "-" if use.hit_rate is None else f"{use.hit_rate:.1%}",
                f"{use.stalls_per_token:.2f}",
                f"{use.to_bytes_per_token / 1e3:,.1f}",
                f"{use.from_bytes_per_token / 1e3:,.1f}",
                f"{use.wait_ms_per_token:.3g}",
                f"{use.memory_bytes / 1e6:,.0f}",
                f"{use.pinned_bytes / 1e6:,.0f}",
            )
    return table


def _words(result: Result) -> Iterator[str]:
    settings = result.settings
    yield (
        f"Measured: medians of up to {settings['repeat']} samples per engine, in turn, on the same loaded weights: "
        f"{PREFILL_TOKENS} tokens of prefill, {settings['decode_tokens']} steps of decode. Our session read every "
        f"token before them{_except_copies(result)}"
        f"{_exception([row for row in result.rows if row.engine == 'actqkv'])}."
    )
    copied = _copied(result, *_PEERS)
    for peer in _peers(result.rows):
        rows = [row for row in result.rows if row.subject == peer]
        read = [row.depth for row in rows if row.context == "read"]
        if read:
            yield f"{peer.label} (dense, flash attention) read up to {max(read):,} tokens{_exception(rows)}."
    if any(row.engine == "other llama.cpp" for row in result.rows):
        yield (
            f"other llama.cpp is that of --peer-python, {settings['other_version']}, in a process of its own with "
            "weights of its own."
        )
    if copied:
        yield (
            f"At {_list(copied)} llama.cpp's context is made of copies of the first {settings['peer_read']:,} tokens, "
            "shifted behind each other: measured over KV of the right size, without reading it for hours."
        )
    yield from _busy(result.machine)
    yield from result.notes


def _except_copies(result: Result) -> str:
    copied = _copied(result, "actqkv")
    if not copied:
        return ""
    return f", except at {_list(copied)}: copies of chunks follow the first {result.settings['read']:,} there"


def _copied(result: Result, *engines: EngineName) -> list[int]:
    return [row.depth for row in result.rows if row.engine in engines and row.context == "copied"]


def _busy(machine: dict[str, Any]) -> Iterator[str]:
    if machine["load_average"] + machine["threads"] > machine["cores"] + _IDLE_LOAD:
        yield "Other work kept this machine busy when the run began: figures are too low, and ratios are uncertain."


def _exception(rows: Sequence[Row]) -> str:
    """What of one engine's rows was not measured."""
    depths = [row.depth for row in rows if not row.measured]
    if not depths:
        return ""
    return f"; figures marked ~ ({_list(depths)}) are extrapolated: ms per token on a line through its last two depths"


def _list(depths: Sequence[int]) -> str:
    return ", ".join(f"{depth:,}" for depth in sorted(set(depths)))


def _peers(rows: Sequence[Row]) -> list[Subject]:
    """llama.cpp's, the linked one first."""
    return [subject for name in _PEERS for subject in dict.fromkeys(row.subject for row in rows if row.engine == name)]


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.engine == "actqkv"))


def _rate(row: Row) -> str:
    return ("" if row.measured else "~") + f"{row.tokens_per_s:,.{0 if row.tokens_per_s >= 100 else 1}f}"
