"""Numbers that the native library reports, as plain records by the names of `actqkv.h`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_IN_MEMORY = 8192  # tokens whose keys and values wait for the next checkpoint, or for a question to end

Phase = Literal["prefill", "decode", "question"]  # how a token enters the history
Mass = Literal["none", "answers", "all"]  # of which windows a recorder measures the true attention mass


@dataclass(frozen=True)
class Params:
    """The parameters in force in a session, by the names of struct actqkv_params; `method` as `methods()` has it."""

    method: str
    columns: dict[str, Any]
    n_ctx: int
    n_threads: int
    n_window: int
    n_sink: int
    n_local: int
    budget: int
    kv_type: str

    @property
    def n_chunk_tokens(self) -> int:
        chunk: int = self.columns["chunk"]
        return chunk


@dataclass(frozen=True)
class FileInfo:
    """What a KV file holds (struct actqkv_file_info): the parameters of its reading (n_ctx and n_threads mean nothing),
    the tokens of the whole reading, how many the last checkpoint has, and whether it is complete."""

    params: Params
    n_tokens: int
    n_done: int
    n_chunks: int
    complete: bool
    version: int
    section_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a session needs at most, with all of n_ctx in use (struct actqkv_memory)."""

    kv_bytes: int
    summary_bytes: int
    checkpoint_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.summary_bytes + self.checkpoint_bytes + self.compute_bytes

    def needed_bytes(self, n_ctx: int, *, n_in_file: int = 0) -> int:
        """Bytes of memory for `n_ctx` tokens, of which `n_in_file` lie in a KV file: without their keys and values,
        save of the last. Their summaries count, as every window reads all of them."""
        return self.total_bytes - self.kv_bytes * max(n_in_file - _IN_MEMORY, 0) // max(n_ctx, 1)

    def file_bytes(self, n_ctx: int, n_in_file: int) -> int:
        """About the bytes of a KV file of so many of the `n_ctx` tokens."""
        return (self.kv_bytes + self.summary_bytes) * n_in_file // max(n_ctx, 1)


@dataclass(frozen=True)
class Stage:
    """Time and bytes that one stage's inner loops took, summed over windows."""

    ms: float
    bytes: int


@dataclass(frozen=True)
class GpuStats:
    """Attention on a GPU since the last reset (struct actqkv_gpu_stats): planned chunks that were there (`n_hits`) or
    not, how often those had to be waited for (`n_stalls`), bytes over the bus, ms that the host waited; of the
    `n_calls`, those whose chunks were chosen there as well (`n_planned`). As things stand: chunks of a layer with room
    there, bytes taken of the GPU's memory and pinned of the CPU's."""

    n_calls: int
    n_hits: int
    n_misses: int
    n_prefetched: int
    n_wasted: int
    n_stalls: int
    to_bytes: int
    from_bytes: int
    wait_ms: float
    n_slots: int
    memory_bytes: int
    pinned_bytes: int
    n_planned: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share (0..1) of planned chunks that were there, or on their way; None where none were planned."""
        n = self.n_hits + self.n_misses
        return self.n_hits / n if n else None

    def __str__(self) -> str:
        rate = "no chunk was planned" if self.hit_rate is None else f"{self.hit_rate:.0%} of planned chunks were there"
        mib = 1 << 20
        return (
            f"{rate}, {self.n_stalls:,} stalls, {self.to_bytes / mib:,.1f} MiB sent, {self.from_bytes / mib:,.1f} MiB "
            f"back, {self.wait_ms:,.0f} ms waited, {self.n_planned:,} of {self.n_calls:,} plans made there; "
            f"{self.memory_bytes / mib:,.0f} MiB of its memory taken, "
            f"{self.pinned_bytes / mib:,.0f} MiB of RAM pinned"
        )


@dataclass(frozen=True)
class GpuPlan:
    """Bytes of a GPU's memory that a session's attention takes (struct actqkv_gpu_memory): of every window, the least
    that it runs with, the most that are of use, and from how many on answering steps are planned there
    too (0: never)."""

    window_bytes: int
    least_bytes: int
    useful_bytes: int
    planning_bytes: int = 0


@dataclass(frozen=True)
class Stats:
    """Time and traffic since the last reset (struct actqkv_stats)."""

    n_prefill_tokens: int
    n_decode_tokens: int
    n_windows: int
    n_replayed_tokens: int
    prefill_ms: float
    decode_ms: float
    graph: Stage
    probe: Stage
    score: Stage
    refine: Stage
    attend: Stage
    append: Stage
    summarize: Stage
    attended_tokens_max: int
    attended_tokens_mean: float
    dense_tokens_max: int
    dense_tokens_mean: float
    n_audits: int
    audit_ms: float
    audit_recall: float
    audit_recall_last: float
    audit_layer: int
    audit_head: int
    gpu: GpuStats


@dataclass(frozen=True)
class Gpu:
    """One GPU; `problem` says why it cannot be used, where CUDA tells."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    problem: str | None = None


@dataclass(frozen=True)
class Cuda:
    """What our CUDA library finds. Versions are 1000 * major + 10 * minor; driver 0 is none."""

    library_problem: str | None
    toolkit: int = 0
    targets: str = ""
    driver: int = 0
    driver_problem: str | None = None
    devices: tuple[Gpu, ...] = ()
