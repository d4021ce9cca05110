"""When this fails, the index of keys has lost some, or has them where a search does not look."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ops_reference as reference
import pytest
from ops_support import KV_TYPES, Guarded, ffi, half, lib, pointer
from test_row_types import stored

Halves = npt.NDArray[np.float16]


def kept(kv_type: str, keys: Halves) -> tuple[reference.Bytes, reference.Array]:
    """Keys [..., d] as closed chunks keep them, in bytes; and their values, turned."""
    rows = stored(kv_type, keys, turned=True)
    values = reference.load_rows(kv_type, rows, keys.shape[-1])
    return rows, reference.turn(values) if kv_type == "f16" else values


def make_stretch(
    impl: int, kv_type: str, rows: reference.Bytes, common: npt.NDArray[np.float32], *, divided: bool
) -> Guarded:
    """rows [n, 2, c, row]: the stretch of their second KV head, which is full where it is in order."""
    n, _, c, _ = rows.shape
    d, in_order = len(common), 0 if divided else c
    second = np.ascontiguousarray(rows)
    found = Guarded(lib.actqkv_stretch_bytes(d, n * c, in_order), np.uint8)
    used = lib.actqkv_stretch_scratch(d, n * c if divided else c)
    scratch = np.full(used + 128, 0xA5, np.uint8)
    start = -scratch.ctypes.data % 64
    room = ffi.cast("void *", scratch.ctypes.data + start)
    stride, first = second.strides[0], second.ctypes.data + second.strides[1]
    if divided:
        at = ffi.cast("uint8_t *", first)
        shape = (c, n, pointer(common), d)
        lib.actqkv_make_stretch(impl, KV_TYPES[kv_type], at, stride, *shape, pointer(found), room)
        assert lib.actqkv_stretch_is_sound(pointer(found), d, n * c, c) == 1
    for i in range(0 if divided else n):
        at = ffi.cast("uint8_t *", first + i * stride)
        shape = (c, pointer(common), d, n * c, i)
        lib.actqkv_add_chunk(impl, KV_TYPES[kv_type], at, *shape, pointer(found), room)
    found.check()
    assert (scratch[start + used :] == 0xA5).all(), "written outside the scratch"
    return found


def keys_of(rng: np.random.Generator, n: int, c: int, d: int) -> tuple[Halves, npt.NDArray[np.float32]]:
    """Keys [n, 2, c, d] of a few kinds around what they have in common, and that [d], about."""
    common = 3 * rng.normal(size=d)
    kinds = rng.normal(size=(12, d))[rng.integers(0, 12, size=(n, 2, c))]
    return half(common + kinds + rng.normal(size=(n, 2, c, d))), common.astype(np.float32)


def check_structure(found: reference.Stretch, n: int, c: int, *, divided: bool) -> None:
    counts = np.diff(found.starts)
    assert found.starts[0] == 0
    assert found.starts[-1] == n * c
    assert counts.min() >= 1
    assert counts.max() <= (reference.CELL_KEYS_MOST if divided else reference.RUN)
    np.testing.assert_array_equal(np.bincount(found.chunks, minlength=n), np.full(n, c))


def key_of_each(found: reference.Stretch, keys: reference.Array, common: reference.Array) -> npt.NDArray[np.int64]:
    """Which of the keys [n, c, d] each key of the stretch is: that of its chunk whose signs agree, and size."""
    n, c, _ = keys.shape
    which = np.empty(n * c, np.int64)
    for chunk in range(n):
        (at,) = np.nonzero(found.chunks == chunk)
        rest = keys[chunk][None] - common - found.centres[found.cells[at]][:, None]
        agree = (found.signs[at][:, None] * np.where(rest < 0, -1, 1)).sum(axis=2)
        others = np.abs(np.abs(rest).mean(axis=2) - found.sizes[at][:, None])
        which[at] = chunk * c + (agree - others / (1 + others.max())).argmax(axis=1)
    return which


SIZES = [(64, 32, 20), (80, 33, 40), (128, 5, 150), (256, 16, 65)]


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(("d", "c", "n"), [*SIZES, (48, 16, 3), (64, 1, 1)])
@pytest.mark.parametrize("divided", [False, True], ids=["in order", "divided"])
def test_every_key_is_sketched_once(
    cpu_impl: int, rng: np.random.Generator, *, kv_type: str, d: int, c: int, n: int, divided: bool
) -> None:
    """Around the rounded mean of its cell, as cells.cpp says."""
    keys, common = keys_of(rng, n, c, d)
    rows, values = kept(kv_type, keys)
    found = reference.stretch(
        make_stretch(cpu_impl, kv_type, rows, common, divided=divided).array, d, n * c, in_order=0 if divided else c
    )
    check_structure(found, n, c, divided=divided)
    shared = reference.turn(common.astype(np.float64))
    which = key_of_each(found, values[:, 1], shared)
    np.testing.assert_array_equal(np.sort(which), np.arange(n * c))
    assert (np.diff(which)[np.diff(found.cells) == 0] > 0).all(), "in order within a cell"
    if not divided:
        np.testing.assert_array_equal(which, np.arange(n * c))
        np.testing.assert_array_equal(found.starts[:-1] % c % reference.RUN, 0)
    own = values[:, 1].reshape(n * c, d)[which] - shared
    means = np.add.reduceat(own, found.starts[:-1]) / np.diff(found.starts)[:, None]
    rounded = reference.rounded_centres(means)
    off = np.abs(found.centres - rounded)  # the mean's last bit may round to the next of 16 steps
    assert (off > 1e-3 * np.abs(rounded).max()).mean() < 0.005
    assert off.max() <= np.abs(rounded).max() / 7
    rest = own - found.centres[found.cells]
    squares = np.add.reduceat(np.square(rest).mean(axis=1), found.starts[:-1]) / np.diff(found.starts)
    np.testing.assert_allclose(found.reaches, np.sqrt(squares), rtol=1e-4, atol=1e-6)
    surely = np.abs(rest) > 1e-5 * np.abs(values).max()
    np.testing.assert_array_equal(found.signs[surely], np.sign(rest)[surely])
    size = np.abs(rest).mean(axis=1)
    assert (np.abs(found.sizes - size) <= 0.5 * found.units + 1e-3 * size).all()
    greatest = np.maximum.reduceat(size, found.starts[:-1])
    np.testing.assert_allclose(found.units[found.starts[:-1]], greatest / 255, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_key_alone_has_its_greatest_channel_on_the_centre(
    cpu_impl: int, rng: np.random.Generator, kv_type: str
) -> None:
    """The sign of what is 0 does not depend on rounding, which differs between machines."""
    keys, common = keys_of(rng, 50, 1, 64)
    rows, values = kept(kv_type, keys)
    raw = make_stretch(cpu_impl, kv_type, rows, common, divided=False).array
    found = reference.stretch(raw, 64, 50, in_order=1)
    greatest = np.abs(values[:, 1, 0] - reference.turn(common.astype(np.float64))).argmax(axis=1)
    assert (found.signs[np.arange(50), greatest] == 1).all()


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("divided", [False, True])
def test_again_is_the_same(cpu_impl: int, rng: np.random.Generator, kv_type: str, *, divided: bool) -> None:
    """And where no key is compared with another, every impl gives the same."""
    keys, common = keys_of(rng, 40, 32, 64)
    rows, _ = kept(kv_type, keys)
    impls = (cpu_impl, cpu_impl if divided else 0)
    first, second = (make_stretch(impl, kv_type, rows, common, divided=divided).array for impl in impls)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_keys_of_a_cell_are_alike(cpu_impl: int, rng: np.random.Generator, kv_type: str) -> None:
    """Of 40 kinds in any order, most cells hold one. Rare ones among them are together, whichever chunk they are of:
    in one cell, or where more than a cell takes are of one centre, in its parts."""
    n, c, d = 128, 32, 64
    kinds = rng.normal(size=(40, d))[rng.integers(0, 40, size=(n, 2, c))]
    keys = kinds + 0.2 * rng.normal(size=(n, 2, c, d))
    rare, chunks, places = 2 * rng.normal(size=d), np.array([3, 40, 41, 99, 127]), np.array([0, 31, 17, 4, 5])
    keys[chunks, 1, places] = rare
    rows, values = kept(kv_type, half(keys))
    common = np.zeros(d, np.float32)
    found = reference.stretch(make_stretch(cpu_impl, kv_type, rows, common, divided=True).array, d, n * c)
    check_structure(found, n, c, divided=True)
    which = key_of_each(found, values[:, 1], np.zeros(d))
    own = values[:, 1].reshape(n * c, d)

    def distances(order: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> float:
        cells = np.split(own[order], starts[1:-1])
        return float(sum(np.square(cell - cell.mean(axis=0)).sum() for cell in cells))

    in_order = distances(np.arange(n * c), np.arange(0, n * c + 1, reference.CELL_KEYS))
    assert distances(which, found.starts) < 0.5 * in_order
    (at,) = np.nonzero(np.isin(which, chunks * c + places))
    assert len(at) == 5
    parts, counts = np.unique(found.cells[at]), np.diff(found.starts)
    assert len(parts) == 1 or counts[parts[0] : parts[-1] + 1].min() >= reference.CELL_KEYS_MOST // 2


def test_many_that_are_equal_are_several_cells(cpu_impl: int, rng: np.random.Generator) -> None:
    keys, common = keys_of(rng, 64, 32, 64)
    keys[:40] = keys[0, :, :1]
    rows, values = kept("f16", keys)
    found = reference.stretch(make_stretch(cpu_impl, "f16", rows, common, divided=True).array, 64, 2048)
    check_structure(found, 64, 32, divided=True)
    of_equal = found.cells[np.isin(found.chunks, np.arange(40))]
    assert len(set(of_equal)) == 5  # of 256 at most
    near = found.centres[of_equal] + reference.turn(common.astype(np.float64)) - values[0, 1, 0]
    assert np.abs(near).max() < 0.5


ODD: dict[str, Any] = {"zero": 0.0, "one": 1.0, "tiny": 6e-8, "greatest": 65504.0, "nan": np.nan, "inf": np.inf}


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", ODD)
def test_odd_keys_do_no_harm(cpu_impl: int, rng: np.random.Generator, *, kv_type: str, name: str, some: bool) -> None:
    """No key is lost by them, and what they share no cell with is as without them."""
    keys, common = keys_of(rng, 33, 32, 64)
    keys[3 if some else slice(None), :, 7 if some else slice(None), 5 if some else slice(None)] = ODD[name]
    rows = stored(kv_type, keys, turned=True)
    for divided in (False, True):
        raw = make_stretch(cpu_impl, kv_type, rows, common, divided=divided).array
        with np.errstate(invalid="ignore"):
            found = reference.stretch(raw, 64, 33 * 32, in_order=0 if divided else 32)
        check_structure(found, 33, 32, divided=divided)
        assert np.isfinite(found.units).all()
        if some and not divided:
            others = np.delete(np.arange(len(found.reaches)), 3)
            assert np.isfinite(found.reaches[others]).all()
            assert np.isfinite(found.centres[others]).all()


def test_what_is_not_sound_is_seen(rng: np.random.Generator) -> None:
    """Numbers that would lead a search out of the stretch: of cells, keys and chunks, and where a cell's keys lie."""
    keys, common = keys_of(rng, 20, 32, 64)
    rows, _ = kept("f16", keys)
    raw = make_stretch(0, "f16", rows, common, divided=True).array
    n_cells, places = int(raw[:4].view(np.uint32)[0]), 64 + (2 + 8 + 1) * 64
    place = int(raw[places : places + 4].view(np.uint32)[0])
    first_chunks = 64 + 768 + -(-(place % 256 + 1) // 16) * 16  # of 13 cells at most: one block of them
    forged = [(0, 4, 0), (0, 4, 1000), (0, 4, n_cells - 1), (0, 4, n_cells + 1), (4, 4, 639), (places, 4, place + 1)]
    forged += [(places, 4, place + 256), (places + 12, 4, 0), (places + 12, 4, 0xFFFF_FFFF), (first_chunks, 2, 20)]
    forged += [(first_chunks + 2, 2, 65_535)]
    for at, size, value in forged:
        other = raw.copy()
        other[at : at + size] = np.frombuffer(value.to_bytes(size, "little"), np.uint8)
        assert lib.actqkv_stretch_is_sound(pointer(other), 64, 640, 32) == 0, (at, value)


def test_chunks_in_order_come_one_by_one(cpu_impl: int, rng: np.random.Generator) -> None:
    """A stretch with room for more has those that it was given; one that begins anew forgets what it had."""
    keys, common = keys_of(rng, 9, 33, 64)
    rows, _ = kept("f16", keys)
    n_bytes = lib.actqkv_stretch_bytes(64, 20 * 33, 33)
    room = np.zeros(lib.actqkv_stretch_scratch(64, 33) + 64, np.uint8)
    scratch = ffi.cast("void *", room.ctypes.data - room.ctypes.data % -64)

    def of(chunks: range, into: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        for i, chunk in enumerate(chunks):
            at = ffi.cast("uint8_t *", np.ascontiguousarray(rows[chunk, 1]).ctypes.data)
            given = (cpu_impl, KV_TYPES["f16"], at, 33, pointer(common), 64, 20 * 33, i)
            lib.actqkv_add_chunk(*given, pointer(into), scratch)
        return into

    used = of(range(9), np.full(n_bytes, 0xA5, np.uint8))
    found = reference.stretch(used, 64, 20 * 33, in_order=33)
    np.testing.assert_array_equal(np.bincount(found.chunks), np.full(9, 33))
    np.testing.assert_array_equal(np.diff(found.starts), [32, 1] * 9)
    np.testing.assert_array_equal(of(range(4, 6), used), of(range(4, 6), np.zeros(n_bytes, np.uint8)))


@pytest.mark.parametrize("in_order", [0, 1, 32])
def test_sizes_that_have_no_stretch(in_order: int) -> None:
    impossible = [(12, 64), (40, 64), (1040, 64), (2048, 64), (64, (1 << 20) + 32)]
    assert {lib.actqkv_stretch_bytes(*size, in_order) for size in impossible} == {0}
    for d, n in ((16, 32), (1024, 64), (64, 1 << 16)):
        assert lib.actqkv_stretch_bytes(d, n, in_order) > n * (3 + d // 8)  # size, chunk and signs of each
        assert lib.actqkv_stretch_bytes(d, n, in_order) % 4 == 0
