"""Breaks when a Llama does not attend on the GPU that is there, or loses something where the GPU is not fit for it.

The GPU is the emulator.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from emulated import emulated_gpu

from actqkv_cpp import GpuMemoryError, GpuUse, Llama, ModelError, NoGpu, ParameterError, Retrieval, gpu, tables
from actqkv_cpp.bench import report
from actqkv_cpp.bench.results import GpuTraffic, Result, Row
from actqkv_cpp.config import parse_bytes
from actqkv_cpp.figures import Cuda, Gpu, GpuPlan, GpuStats
from actqkv_cpp.placement import Placement

SMALL = Retrieval(n_sink=4, n_local=32, chunk=8, window=16, budget=4 + 32 + 5 * 8, positions="clamped")
TEXT = "The lamp stood on the shelf. " * 6
MIB = 1 << 20
PLAN = GpuPlan(10 * MIB, 30 * MIB, 200 * MIB)
CARD = Gpu("Card", (8, 9), 24 << 30, 20 << 30)
READY = Cuda(None, 13000, "80", 13010, None, (CARD,))

Faulty = Callable[..., None]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """Has this process find the emulator's GPU, with faults or without."""

    def arrange(**faults: int) -> None:
        for name, value in emulated_gpu(**faults).items():
            monkeypatch.setenv(name, value)

    return arrange


def load(model: Path, **more: Any) -> Llama:
    return Llama(model, n_ctx=512, n_threads=1, retrieval=SMALL, verbose=False, **more)


def answered(llm: Llama) -> tuple[str, np.ndarray, Any]:
    """What is said, the logits behind its last token, and the answer's figures of the GPU."""
    answer = llm.read(text=TEXT).ask("Where?", max_tokens=6)
    assert llm.session is not None
    return answer.text, llm.scores[-1].copy(), answer.gpu


@pytest.fixture(scope="module")
def on_cpu(tiny_model: Path) -> tuple[str, np.ndarray]:
    with load(tiny_model, vram=0) as llm:
        assert isinstance(llm.gpu, NoGpu)
        text, logits, none = answered(llm)
    assert none is None
    return text, logits


def same(found: tuple[str, np.ndarray, Any], expected: tuple[str, np.ndarray]) -> None:
    """Another plan would change logits by whole numbers; keys and values that round to other halves, by far less."""
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_it_answers_as_the_processor_does(tiny_model: Path, on_cpu: tuple[str, np.ndarray], faulty: Faulty) -> None:
    """A Llama without options uses the GPU; an answer says what went over the bus."""
    faulty()
    with load(tiny_model) as llm:
        assert llm.gpu == GpuUse(0, "emulated", llm.gpu.limit_bytes)  # type: ignore[union-attr]
        found = answered(llm)
        assert llm.session is not None
        stats = llm.session.stats().gpu
        llm.session.stats_reset()
        assert llm.session.stats().gpu.n_calls == 0
    same(found, on_cpu)
    assert found[2].n_calls > 0
    assert found[2].hit_rate is not None
    assert found[2].to_bytes > found[2].from_bytes > 0
    assert 0 < stats.memory_bytes <= llm.gpu.limit_bytes  # type: ignore[union-attr]
    assert stats.pinned_bytes > 0


@pytest.mark.parametrize(
    ("faults", "problem"),
    [
        ({"fail_launch": 40}, "launch failure"),  # in the middle of reading
        ({"fail_copy": 10}, "launch failure"),
        ({"fail_copy": 200}, "launch failure"),
        ({"fail_malloc": 2}, "out of memory"),  # at the beginning
        ({"devices": 0}, "there is no GPU 0"),
        ({"driver": 0}, "no NVIDIA driver"),
        ({"major": 7}, "compute capability 7.0, 8.0 is needed"),
        ({"devices": 2}, None),  # the emulator's second one fails
        ({"free": 600 << 20}, None),
        ({"free": 512 << 20}, "has 512 MiB free"),
    ],
    ids=["launch", "copy", "later copy", "malloc", "no device", "no driver", "old", "another fails", "enough", "full"],
)
def test_without_it_nothing_is_lost(
    tiny_model: Path, on_cpu: tuple[str, np.ndarray], faulty: Faulty, faults: dict[str, int], problem: str | None
) -> None:
    """The processor takes over wherever the GPU fails, with the same answer and the reason."""
    faulty(**faults)
    with load(tiny_model) as llm:
        same(answered(llm), on_cpu)
        where = llm.gpu
    assert isinstance(where, GpuUse) if problem is None else problem in str(where)
    assert "\n" not in str(where)


def test_memory_that_cannot_be_pinned(tiny_model: Path, on_cpu: tuple[str, np.ndarray], faulty: Faulty) -> None:
    """Copies come from ordinary memory then; that is said."""
    faulty(fail_pin=3)
    with load(tiny_model) as llm:
        same(answered(llm), on_cpu)
        assert isinstance(llm.gpu, GpuUse)
        assert llm.session is not None
        assert "ordinary memory" in (llm.session.gpu_problem or "")
        assert f"of its memory; {llm.session.gpu_problem}" in str(llm.gpu)


@pytest.mark.parametrize("n", range(1, 9))
def test_any_allocation_may_fail(tiny_model: Path, faulty: Faulty, n: int) -> None:
    """Asked for, memory that another process took meanwhile is one line of error, and Llama can be made again."""
    faulty(fail_malloc=n)
    try:
        with load(tiny_model, vram="64m") as llm:
            assert isinstance(llm.gpu, GpuUse), "the session should not have gone on unsaid"
    except GpuMemoryError as error:
        refused = f"{error} {error.hint}"
    else:
        refused = ""
    assert not refused or ("out of memory" in refused and "vram 0" in refused)
    faulty(fail_malloc=0)
    with load(tiny_model, vram="64m") as llm:
        assert isinstance(llm.gpu, GpuUse)


def test_too_little_is_refused(tiny_model: Path, faulty: Faulty) -> None:
    """Before anything is taken; with the least that works."""
    faulty()
    with pytest.raises(GpuMemoryError, match="attention on a GPU needs at least") as caught:
        load(tiny_model, vram="20k")
    least = re.search(r"give vram (\w+) or more", str(caught.value.hint))
    assert least is not None
    with load(tiny_model, vram=least[1]) as llm:
        assert isinstance(llm.gpu, GpuUse)
        assert llm.session is not None
        assert llm.session.stats().gpu.memory_bytes <= parse_bytes(least[1])


@pytest.mark.parametrize(("method", "why"), [("quest-clamped", "per KV head"), ("dense", "attends everything")])
def test_methods_that_stay(tiny_model: Path, faulty: Faulty, method: str, why: str) -> None:
    """A method that no GPU serves is not said to be on one."""
    faulty()
    retrieval = Retrieval(method, n_sink=4, n_local=32, chunk=8, window=16, budget=76)
    with Llama(tiny_model, n_ctx=512, n_threads=1, retrieval=retrieval, verbose=False) as llm:
        assert why in str(llm.gpu)


def test_a_library_that_does_not_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the processor."""
    monkeypatch.setenv("ACTQKV_CUDA_LIBRARY", "/nowhere/libactqkv_cuda.so")
    with load(tiny_model, vram="1g") as llm:
        assert "do not load: /nowhere/libactqkv_cuda.so" in str(llm.gpu)


def test_traffic_of_a_benchmark() -> None:
    """Breaks when bench adds samples up wrongly, or shows nothing of them."""
    one = GpuStats(6, 30, 10, 5, 1, 3, 4000, 1000, 2.0, 8, 1 << 20, 1 << 19)
    idle = GpuStats(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0)
    assert GpuTraffic.of([idle, idle], 8) is None
    found = GpuTraffic.of([one, one], 8)
    assert found == GpuTraffic(
        hit_rate=0.75, stalls_per_token=0.75, to_bytes_per_token=1000, from_bytes_per_token=250, wait_ms_per_token=0.5,
        memory_bytes=1 << 20, pinned_bytes=1 << 19,
    )  # fmt: skip
    row = Row(
        engine="actqkv", method="actqkv", kv_type="f16", phase="decode", depth=512, ms_per_token=1.0, measured=True,
        n=2, spread_ms=(1.0, 1.0), context="read", gpu=found,
    )  # fmt: skip
    result = Result(
        version="0.1.0", commit=None, started="", machine={}, model={}, settings={}, rows=(row,), notes=()
    )  # fmt: skip
    table = report._gpu(result, "actqkv")
    assert table is not None
    assert "75.0%" in tables.to_text([table], width=120)


def test_what_is_chosen() -> None:
    """Breaks when a default takes all of a GPU, or what was asked for is not held to."""
    assert gpu.choose(READY, 0, PLAN, 1 << 30, asked=False) == GpuUse(0, "Card", PLAN.useful_bytes)
    assert gpu.choose(READY, 0, PLAN, 50 * MIB, asked=False) == GpuUse(0, "Card", 50 * MIB)  # whatever is free by now
    tight = Cuda(None, 13000, "80", 13010, None, (Gpu("Card", (8, 0), 1 << 30, gpu.SPARE_BYTES + 50 * MIB),))
    assert gpu.choose(tight, 0, PLAN, 1 << 30, asked=False) == GpuUse(0, "Card", 50 * MIB)
    assert isinstance(gpu.choose(tight, 0, PLAN, 29 * MIB, asked=False), NoGpu)
    assert gpu.choose(tight, 0, PLAN, 100 * MIB, asked=True) == GpuUse(0, "Card", 100 * MIB)
    with pytest.raises(GpuMemoryError, match="562 MiB free"):
        gpu.choose(tight, 0, GpuPlan(10 * MIB, 30 * MIB, 2 << 30), 1 << 30, asked=True)
    with pytest.raises(GpuMemoryError, match="needs at least 30 MiB"):
        gpu.choose(READY, 0, PLAN, 29 * MIB, asked=True)
    assert isinstance(gpu.choose(READY, 1, PLAN, 1 << 30, asked=False), NoGpu)


def test_where_plans_are_made() -> None:
    """Breaks when too little memory for plans is not said, or enough of it is."""
    plan = GpuPlan(10 * MIB, 30 * MIB, 200 * MIB, 90 * MIB)
    assert "plans" not in str(gpu.choose(READY, 0, plan, 90 * MIB, asked=True))
    assert "its plans on the processor, there from 90 MiB on" in str(
        gpu.choose(READY, 0, plan, 90 * MIB - 1, asked=True)
    )
    assert "plans" not in str(gpu.choose(READY, 0, PLAN, 40 * MIB, asked=True))


def test_layers() -> None:
    """Breaks when more layers go to a GPU than fit, or fewer without a word."""
    every = gpu.choose_layers(None, 32, 33 * MIB, 100 * MIB, 40 * MIB)
    assert (every.n, every.most, every.reason) == (33, 33, None)
    some = gpu.choose_layers(None, 32, 33 * MIB, 50 * MIB, 40 * MIB)
    assert some.n == 10
    assert "50 MiB are free" in str(some)
    assert gpu.choose_layers(None, 32, 33 * MIB, 10 * MIB, 40 * MIB).n == 0
    assert gpu.choose_layers(-1, 32, 33 * MIB, 100 * MIB, 40 * MIB).n == 33
    assert gpu.choose_layers(7, 32, 33 * MIB, 100 * MIB, 40 * MIB).n == 7
    with pytest.raises(GpuMemoryError, match=r"20 of 33 layers take 20 MiB .* 50 MiB are free") as caught:
        gpu.choose_layers(20, 32, 33 * MIB, 50 * MIB, 40 * MIB)
    assert "n_gpu_layers 10" in str(caught.value.hint)


def test_layers_of_a_file(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, faulty: Faulty) -> None:
    """Breaks when the plan is of another model than the one that is to be loaded."""
    faulty(free=(512 << 20) + (1 << 30))  # what is spared, and nothing beside attention
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    with pytest.raises(GpuMemoryError, match=r"2 of 4 layers take . MiB of GPU memory and attention 1,024 MiB"):
        load(tiny_model, n_gpu_layers=2)
    with load(tiny_model, n_gpu_layers=None) as llm:
        assert (llm.gpu_layers.n, llm.gpu_layers.most) == (0, 4)
        assert "no more fit" in str(llm.gpu_layers)


def test_attention_has_the_memory_of_its_own_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when attention counts on memory of another GPU, or weights on none of it."""
    gib = 1 << 30
    cards = tuple(Gpu("Card", (8, 9), 24 * gib, free * gib) for free in (6, 18))
    monkeypatch.setattr("actqkv_cpp._cuda.find_cuda", lambda: Cuda(None, 13000, "80", 13010, None, cards))
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr("actqkv_cpp.modelfile.sizes", lambda path: (31, 16 * gib))  # 0.5 GiB each, the output too
    both = Placement(None, 0)
    assert both.layers(str(tiny_model), None).n == 32
    assert both.limit_bytes == 6 * gib - 16 * gib // 4 - gpu.SPARE_BYTES
    alone = Placement(None, 0, spread=False)
    assert alone.layers(str(tiny_model), None).n == 9, "4.5 GiB, beside 1 for attention and a half that is spared"
    assert alone.limit_bytes == gib
    other = Placement("3g", 1)
    assert other.layers(str(tiny_model), None).n == 32
    with pytest.raises(GpuMemoryError, match=r"32 of 32 layers take 16,384 MiB of GPU memory and attention 3,072 MiB"):
        Placement("3g", 0).layers(str(tiny_model), -1)


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch, faulty: Faulty) -> Callable[[int, bytes], list[int]]:
    """Has libllama fail on more layers than a number, with this error in its log; gives what it was asked for."""
    real = llama_cpp.Llama.__init__
    asked: list[int] = []

    def arrange(most: int, line: bytes) -> list[int]:
        @functools.wraps(real)
        def load_some(self: Any, path: str, **options: Any) -> None:
            asked.append(options["n_gpu_layers"])
            if asked[-1] > most:
                log, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
                llama_cpp.llama_log_get(ctypes.byref(log), ctypes.byref(user))
                log(4, line, user)
                raise ValueError("Failed to load model from file")
            real(self, path, **options)

        monkeypatch.setattr(llama_cpp.Llama, "__init__", load_some)
        return asked

    faulty(free=4 << 30)
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    return arrange


OUT_OF_MEMORY = b"llama_model_load: error loading model: unable to allocate CUDA0 buffer"


@pytest.mark.parametrize(("most", "tried"), [(1, [4, 3, 2, 1]), (0, [4, 3, 2, 1, 0])])
def test_memory_taken_before_weights_are_there(
    tiny_model: Path, on_cpu: tuple[str, np.ndarray], small_card: Any, most: int, tried: list[int]
) -> None:
    """Fewer layers go to the GPU, that is said, and attention takes no more than before."""
    asked = small_card(most, OUT_OF_MEMORY)
    with load(tiny_model, n_gpu_layers=None) as llm:
        assert asked == tried
        assert (llm.gpu_layers.n, llm.gpu_layers.most) == (most, 4)
        assert "no more could be loaded" in str(llm.gpu_layers)
        assert "unable to allocate CUDA0" in str(llm.gpu_layers)
        assert llm._placement.limit_bytes < (4 << 30) - gpu.SPARE_BYTES
        same(answered(llm), on_cpu)


def test_layers_asked_for_that_do_not_load(tiny_model: Path, small_card: Any) -> None:
    """The GPU's memory is named and the remedy, not the file; and a broken file is still one."""
    small_card(0, OUT_OF_MEMORY)
    with pytest.raises(GpuMemoryError, match=r"2 layers of .* do not fit .*unable to allocate CUDA0") as caught:
        load(tiny_model, n_gpu_layers=2)
    assert "smaller n_gpu_layers, 0 for the processor" in str(caught.value.hint)


@pytest.mark.parametrize("line", [b"tensor 'x' is out of bounds", b"failed to allocate CPU buffer of size 9"])
def test_other_failures_are_not_the_gpu_s(tiny_model: Path, small_card: Any, line: bytes) -> None:
    """A broken file, or too little RAM, is blamed on the GPU."""
    small_card(-1, line)
    with pytest.raises(ModelError, match=line.decode()):
        load(tiny_model, n_gpu_layers=None)


def test_the_limit_is_known_before_loading(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, faulty: Faulty) -> None:
    """Breaks when attention may take more than weights leave of what was free before they were there."""
    faulty(free=4 << 30)
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    placement = Placement(None, 0)
    layers = placement.layers(str(tiny_model), None)
    assert layers.n == layers.most == 4
    assert placement.limit_bytes == (4 << 30) - layers.n_bytes - gpu.SPARE_BYTES
    assert placement.expected(SMALL) == GpuUse(0, "emulated", placement.limit_bytes)
    assert "per KV head" in str(placement.expected(Retrieval("quest-clamped")))
    placement.layers(str(tiny_model), 0)
    assert placement.limit_bytes == (4 << 30) - gpu.SPARE_BYTES
    assert Placement("6m", 0).limit_bytes == 6 * MIB
    assert "vram is 0" in str(Placement(0, 0).expected(SMALL))


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("6g", 6 << 30), ("512M", 512 << 20), ("1.5GB", 3 << 29), ("0", 0), (77, 77), ("2 k", 2048)]
)
def test_bytes(text: str | int, n_bytes: int) -> None:
    """Breaks when a size in bytes is read otherwise."""
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "g", "-1", "6x", "6 gigs", -1, True, 1.5])
def test_not_bytes(text: Any) -> None:
    """Breaks when nonsense is taken for a size."""
    with pytest.raises(ParameterError, match="not a size in bytes"):
        parse_bytes(text)
