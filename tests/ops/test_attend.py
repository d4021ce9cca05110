"""When this fails, attention is wrong: the model reads something else than what was planned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import ops_reference as reference
import pytest
from ops_support import BOUNDS, EMULATED, KV_TYPES, Guarded, check, ffi, half, lib, nmse, pointer

RATIOS = [(4, 4), (8, 4), (6, 2), (8, 2), (8, 1), (14, 2)]  # r = 1, 2, 3, 4, 8, 7


@dataclass
class Span:
    """float16 [G][n][d], kept as rows of kv_type."""

    far: npt.NDArray[np.float16] | None
    near: npt.NDArray[np.float16] | None
    v: npt.NDArray[np.float16]
    first: int
    kv_type: str = "f16"

    @property
    def n_tok(self) -> int:
        return self.v.shape[1]

    @property
    def rows(self) -> list[reference.Bytes | None]:
        return [None if x is None else reference.store_rows(self.kv_type, x) for x in (self.far, self.near, self.v)]

    def read(self, kv: slice) -> reference.Span:
        d = self.v.shape[-1]
        far, near, v = (None if x is None else reference.load_rows(self.kv_type, x, d)[kv] for x in self.rows)
        assert v is not None
        return reference.Span(far, near, v, self.first, turned=self.kv_type != "f16")


@dataclass
class Case:
    """One call: what the args struct points to."""

    spans: list[Span]
    q_near: npt.NDArray[np.float32]
    q_far: npt.NDArray[np.float32]
    q_turned: npt.NDArray[np.float32]  # independent of the others, to know who meets whom
    k_window: npt.NDArray[np.float16]
    v_window: npt.NDArray[np.float16]
    n_past: int
    n_clamp: int
    scale: float
    first_summed: int = 0
    lists: list[list[Span]] = field(default_factory=list)  # per KV head, in place of spans

    @property
    def expected(self) -> tuple[reference.Array, reference.Array, reference.Array]:
        if not self.lists:
            return self._expected(self.spans, slice(None), slice(None))
        r = self.q_near.shape[1] // len(self.lists)
        parts = [self._expected(s, slice(g, g + 1), slice(g * r, g * r + r)) for g, s in enumerate(self.lists)]
        out, sums, mass = zip(*parts, strict=True)
        return np.concatenate(out, axis=1), np.concatenate(sums), np.array(mass) / len(self.lists)

    def _expected(
        self, spans: list[Span], kv: slice, heads: slice
    ) -> tuple[reference.Array, reference.Array, reference.Array]:
        near, far, turned = (x[:, heads].astype(np.float64) for x in (self.q_near, self.q_far, self.q_turned))
        return reference.attend(
            [s.read(kv) for s in spans], (near, far, turned),
            *(x[kv].astype(np.float64) for x in (self.k_window, self.v_window)),
            n_past=self.n_past, n_clamp=self.n_clamp, scale=self.scale,
        )  # fmt: skip

    @property
    def of_heads(self) -> list[list[Span]]:
        """The spans of every KV head, one list for all or a list each."""
        return self.lists or [self.spans] * len(self.k_window)

    @property
    def first_key(self) -> int:
        return sum(s.n_tok for s in self.spans[: self.first_summed])

    @property
    def n_keys(self) -> int:
        return sum(s.n_tok for s in self.spans) + len(self.q_near)


def make(
    rng: np.random.Generator,
    *,
    m: int,
    n_head: int,
    n_head_kv: int,
    d: int,
    far: tuple[int, ...] = (),
    both: tuple[int, ...] = (),
    near: tuple[int, ...] = (),
    n_clamp: int = 70,
    kv_type: str = "f16",
) -> Case:
    """Spans of these lengths in this order; `both` and `near` are the last tokens of the past, without gaps.

    kv_type: of the far ones.
    """

    def tokens(n: int) -> npt.NDArray[np.float16]:
        return half(rng.normal(size=(n_head_kv, n, d)))

    n_past = 5000
    first = n_past - sum(both) - sum(near)
    spans = [Span(tokens(n), None, tokens(n), 100 * i, kv_type) for i, n in enumerate(far)]
    for kind, lengths in (("both", both), ("near", near)):
        for n in lengths:
            spans.append(Span(tokens(n) if kind == "both" else None, tokens(n), tokens(n), first))
            first += n
    queries = (rng.normal(size=(m, n_head, d)).astype(np.float32) * 1.5 for _ in range(3))
    return Case(spans, *queries, tokens(m), tokens(m), n_past, n_clamp, 1 / np.sqrt(d), len(far))


def run(case: Case, impl: int, n_threads: int, *, sums: bool = True, mass: bool = True) -> tuple[npt.NDArray, ...]:  # type: ignore[type-arg]
    """out, sums, mass of one call. Scratch holds a NaN pattern first: nothing in it may be read before written."""
    m, n_head, d = case.q_near.shape
    n_head_kv = len(case.k_window)
    lists = case.lists or [case.spans]
    spans = ffi.new("struct actqkv_span[]", max(len(lists) * len(case.spans), 1))
    rows = [s.rows for s in itertools.chain(*lists)]
    for to, s, arrays in zip(spans, itertools.chain(*lists), rows, strict=False):
        to.far, to.near, to.v = (pointer(x) for x in arrays)
        to.far_stride = to.near_stride = to.v_stride = s.n_tok * arrays[-1].shape[-1]
        to.first, to.n_tok, to.kv_type = s.first, s.n_tok, KV_TYPES[s.kv_type]
    n_summed = case.n_keys - case.first_key
    out, weight_sums = Guarded((m, n_head, d)), Guarded((n_head, n_summed + 3))
    span_mass = Guarded((len(lists), len(case.spans)) if case.lists else len(case.spans), np.float64)
    size = lib.actqkv_attend_scratch(n_head, n_head_kv, d, m, case.n_keys, n_threads)
    raw = np.full(size + 128, 0xFF, np.uint8)
    begin = -raw.ctypes.data % 64
    args = ffi.new("struct actqkv_attend_args *")
    args.n_head, args.n_head_kv, args.d_head, args.m = n_head, n_head_kv, d, m
    args.n_past, args.n_clamp, args.scale = case.n_past, case.n_clamp, case.scale
    args.q_near, args.q_far = pointer(case.q_near), pointer(case.q_far)
    quantised = any(s.kv_type != "f16" for s in itertools.chain(*lists))
    args.q_turned = pointer(case.q_turned) if quantised else ffi.NULL
    args.spans, args.n_spans, args.span_stride = spans, len(case.spans), len(case.spans) if case.lists else 0
    args.k_window, args.v_window, args.window_stride = pointer(case.k_window), pointer(case.v_window), m * d
    args.out, args.first_summed = pointer(out), case.first_summed
    args.weight_sums, args.sum_stride = pointer(weight_sums) if sums else ffi.NULL, n_summed + 3
    args.span_mass = pointer(span_mass) if mass else ffi.NULL
    args.n_threads, args.scratch = n_threads, ffi.cast("void *", raw.ctypes.data + begin)
    lib.actqkv_attend(impl, args)
    for g in (out, weight_sums, span_mass):
        g.check()
    assert np.all(raw[:begin] == 0xFF), "written before scratch"
    assert np.all(raw[begin + size :] == 0xFF), "written behind scratch"
    assert np.all(weight_sums.untouched[:, n_summed:] if sums else weight_sums.untouched), "written between the rows"
    assert mass or np.all(span_mass.untouched)
    return out.array, weight_sums.array[:, :n_summed], span_mass.array


def bound_of(case: Case, impl: int) -> str | None:
    """Its name where it is not the op's own."""
    quantised = any(s.kv_type != "f16" for s in itertools.chain(*case.of_heads))
    return "attend.rounded" if impl >= EMULATED and len(case.q_near) > 1 and quantised else None


def counts(impl: int, *n_threads: int) -> tuple[int, ...]:
    """A GPU knows no n_threads: one number of them is enough there."""
    return n_threads if impl < EMULATED else n_threads[:1]


def verify(case: Case, impl: int, n_threads: int) -> None:
    out, sums, mass = run(case, impl, n_threads)
    expected_out, expected_sums, expected_mass = case.expected
    bound = bound_of(case, impl)
    check("attend.out", out, expected_out, bound=bound)
    check("attend.sums", sums, expected_sums[:, case.first_key :], bound=bound)
    check("attend.mass", mass, expected_mass, bound=bound)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("m", [1, 2, 9, 70])
@pytest.mark.parametrize(("n_head", "n_head_kv"), RATIOS)
def test_group_ratios(
    impl: int, rng: np.random.Generator, *, n_threads: int, m: int, n_head: int, n_head_kv: int, kv_type: str
) -> None:
    lengths = {"far": (8, 32, 5), "both": (32, 17), "near": (32, 3)}
    case = make(rng, m=m, n_head=n_head, n_head_kv=n_head_kv, d=64, kv_type=kv_type, **lengths)
    verify(case, impl, n_threads)


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128, 256, 20, 72])
def test_head_dimensions(impl: int, rng: np.random.Generator, *, m: int, d: int) -> None:
    verify(make(rng, m=m, n_head=4, n_head_kv=2, d=d, far=(64, 32), both=(30,), near=(32, 11)), impl, 2)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(
    "spans",
    [
        {},
        {"far": (1,)},
        {"near": (200,)},
        {"both": (300,)},
        {"far": (0, 3, 0), "near": (0, 1)},
        {"far": (33, 1, 64, 65), "both": (1, 64, 7), "near": (2, 63)},
        {"far": tuple([32] * 12), "both": (32, 32), "near": (32,)},
    ],
    ids=lambda s: "-".join(s) or "none",
)
def test_shapes_of_the_past(impl: int, rng: np.random.Generator, *, m: int, spans: dict[str, tuple[int, ...]]) -> None:
    for n_threads in counts(impl, 1, 2, 3):
        verify(make(rng, m=m, n_head=6, n_head_kv=3, d=32, **spans), impl, n_threads)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 96, 112, 128, 256])
def test_head_dimensions_of_quantised_rows(
    impl: int, rng: np.random.Generator, *, m: int, d: int, kv_type: str
) -> None:
    """Whole and half blocks; a panel that f16 rows share, and keys met near, as exact positions keep them."""
    case = make(rng, m=m, n_head=6, n_head_kv=2, d=d, far=(32, 5), both=(30,), near=(32, 11), kv_type=kv_type)
    case.spans[-2].kv_type = kv_type
    case.spans[0].kv_type = "f16"
    verify(case, impl, 2)


@pytest.mark.parametrize("m", [1, 25])
@pytest.mark.parametrize("n_clamp", [0, 1, 30, 64, 90, 1000])
def test_the_far_and_near_rule(impl: int, rng: np.random.Generator, *, m: int, n_clamp: int) -> None:
    verify(make(rng, m=m, n_head=4, n_head_kv=2, d=32, far=(32,), both=(20, 32, 32), n_clamp=n_clamp), impl, 2)


def test_sorts_that_alternate(impl: int, rng: np.random.Generator) -> None:
    """Every span another sort than the one before: no two share a panel."""
    case = make(rng, m=20, n_head=4, n_head_kv=2, d=32, far=tuple([3] * 40), near=tuple([2] * 40))
    far, near = case.spans[:40], case.spans[40:]
    case.spans = [s for pair in zip(far, near, strict=True) for s in pair]
    case.first_summed = 50
    verify(case, impl, 2)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("first_summed", [0, 90, 281, 282])
def test_more_keys_than_one_pass_holds(
    impl: int, rng: np.random.Generator, *, sums: bool, mass: bool, m: int, first_summed: int
) -> None:
    case = make(rng, m=m, n_head=2, n_head_kv=1, d=32, far=tuple([32] * 280), near=(500, 20))
    case.first_summed = first_summed
    expected_out, expected_sums, expected_mass = case.expected
    for n_threads in counts(impl, 1, 2):
        out, actual_sums, actual_mass = run(case, impl, n_threads, sums=sums, mass=mass)
        check("attend.out", out, expected_out)
        if sums:
            check("attend.sums", actual_sums, expected_sums[:, case.first_key :])
        if mass:
            check("attend.mass", actual_mass, expected_mass)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [1, 2, 45])
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 4), (8, 2), (6, 3)])
@pytest.mark.parametrize("n_far", [3, 280], ids=["one pass", "more"])
def test_a_list_per_kv_head(
    impl: int, rng: np.random.Generator, *, n_threads: int, m: int, n_head: int, n_head_kv: int, n_far: int
) -> None:
    """Every KV head attends its own far spans; what follows them, and its sums, is shared."""
    shape = {"m": m, "n_head": n_head, "n_head_kv": n_head_kv, "d": 32}
    kv_type = "f16" if n_far > 3 else "q8_0"
    case = make(rng, **shape, far=(32,) * n_far, both=(20, 32), near=(9,), kv_type=kv_type)
    shared = case.spans[n_far:]
    for _ in range(n_head_kv):
        own = make(rng, **shape, far=(32,) * n_far, kv_type=kv_type).spans
        case.lists.append([*own, *shared])
    verify(case, impl, n_threads)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_more_threads_than_work(impl: int, rng: np.random.Generator, m: int) -> None:
    """A thread without keys of its own adds what it found in scratch."""
    for n_threads in counts(impl, 12, 24, 61):
        for n_far in (0, 1, 5):
            verify(make(rng, m=m, n_head=4, n_head_kv=2, d=32, far=(n_far,)), impl, n_threads)


def test_a_whole_window(impl: int, rng: np.random.Generator) -> None:
    case = make(
        rng, m=300, n_head=4, n_head_kv=1, d=64, far=tuple([32] * 20), both=tuple([32] * 9), near=(60,), n_clamp=350
    )
    verify(case, impl, 2)


@pytest.mark.parametrize("m", [1, 30])
def test_large_logits_do_not_overflow(impl: int, rng: np.random.Generator, m: int) -> None:
    case = make(rng, m=m, n_head=4, n_head_kv=2, d=64, far=(64, 32), near=(32,))
    case.scale = 30.0  # logits of several hundred: one key takes nearly all
    out, sums, mass = run(case, impl, 2)
    expected_out, expected_sums, expected_mass = case.expected
    # A logit of 1000 is a float sum with an error near 1e-4, and so is the weight's, relatively.
    assert nmse(out, expected_out) < 1e-6
    assert nmse(sums, expected_sums[:, case.first_key :]) < 1e-6
    assert nmse(mass, expected_mass) < 1e-6


@pytest.mark.parametrize("m", [1, 100])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_runs_are_bit_equal(impl: int, rng: np.random.Generator, *, m: int, n_threads: int) -> None:
    case = make(rng, m=m, n_head=7, n_head_kv=1, d=64, far=tuple([32] * 30), both=(32,), near=(90,))
    first = run(case, impl, n_threads)
    for _ in range(3):
        for a, b in zip(first, run(case, impl, n_threads), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_scalar_and_fast_agree(impl: int, rng: np.random.Generator, *, m: int, kv_type: str) -> None:
    lengths = {"far": tuple([32] * 30), "both": (64,), "near": (100,)}
    case = make(rng, m=m, n_head=8, n_head_kv=2, d=128, kv_type=kv_type, **lengths)
    for name, a, b in zip(("out", "sums", "mass"), run(case, impl, 2), run(case, 0, 1), strict=True):
        assert nmse(a, b) <= BOUNDS[bound_of(case, impl) or f"attend.{name}"]


def test_scratch_grows_with_its_arguments() -> None:
    """A caller allocates once for its largest window."""
    size = lib.actqkv_attend_scratch(32, 8, 128, 256, 131072, 2)
    for m, n_keys in ((1, 1), (1, 2000), (1, 8192), (1, 8193), (2, 100), (100, 3000), (256, 131071)):
        assert lib.actqkv_attend_scratch(32, 8, 128, m, n_keys, 2) <= size
    assert size < 64 << 20
