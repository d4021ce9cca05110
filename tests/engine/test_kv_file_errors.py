"""Breaks when a KV file that is damaged, foreign or forged is taken for what it is not, or crashes.

The layout and the checksum are written down here a second time, from the description in native/kv/file.h.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf as tiny
from engine_support import in_child, loaded, open_session, random_tokens, small
from llama_cpp._internals import LlamaModel
from numpy.typing import NDArray
from test_state_errors import MODEL, OTHER_MODELS, WORD, checksum

from actqkv_cpp import ActqkvError, StateError, kvfile
from actqkv_cpp._actqkv import ffi

RETRIEVAL = small(summary="bounds", refine=2)  # has all five arrays, of which so short a reading leaves the index empty
TOKENS, FURTHER = random_tokens(250), random_tokens(24, seed=1)
SECTION = b"section of the caller"
ALIGN = 65536
N_PARAMS = ffi.sizeof("struct actqkv_params")
N_ARRAYS, INDEX = 5, 4  # keys, values, summaries, norms, index
CHUNK = 8
AT_PARAMS = 64 + 8 * N_ARRAYS
HEADER = AT_PARAMS + -(-N_PARAMS // 8) * 8


def aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


@dataclass
class Layout:
    """Where the parts of a file lie."""

    n_tokens: int
    n_section: int
    slot_bytes: int
    n_chunks: int
    n_layer: int
    chunk_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        self.tokens = ALIGN
        self.section = aligned(self.tokens + 5 * self.n_tokens + 8)
        self.slots = aligned(self.section + self.n_section + 8)
        self.table = self.slots + 2 * aligned(self.slot_bytes)
        self.arrays = aligned(self.table + 4 * N_ARRAYS * self.n_chunks * self.n_layer)
        self.sizes = [aligned(self.n_kept(which, self.n_chunks) * n) for which, n in enumerate(self.chunk_bytes)]
        self.end = self.arrays + self.n_layer * sum(self.sizes)

    def n_kept(self, which: int, n_chunks: int) -> int:
        """Elements of an array where n_chunks are closed: of the index, an element is a stretch."""
        return n_chunks // (65_536 // CHUNK) if which == INDEX else n_chunks

    def array(self, layer: int, which: int) -> int:
        return self.arrays + layer * sum(self.sizes) + sum(self.sizes[:which])

    def slot(self, i: int) -> int:
        return self.slots + i * aligned(self.slot_bytes)


def layout_of(data: bytes) -> Layout:
    n_tokens, n_section, slot_bytes, n_chunks = struct.unpack_from("<qQQq", data, 24)
    return Layout(
        n_tokens, n_section, slot_bytes, n_chunks, struct.unpack_from("<i", data, 56)[0],
        struct.unpack_from(f"<{N_ARRAYS}Q", data, 64),
    )  # fmt: skip


def put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def with_header(data: bytes, at: int, value: bytes) -> bytes:
    """Another header, with the checksum to match."""
    head = put(data[:HEADER], at, value)
    return head + struct.pack("<Q", checksum(head)) + data[HEADER + 8 :]


def with_slots(data: bytes, at: int, value: bytes) -> bytes:
    """Both slots written over at their byte `at`, with checksums to match."""
    layout = layout_of(data)
    for i in range(2):
        start = layout.slot(i)
        (payload,) = struct.unpack_from("<Q", data, start + 48)
        slot = put(data[start : start + 56 + payload], at, value)
        data = put(data, start, slot + struct.pack("<Q", checksum(slot)))
    return data


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_gguf(tmp_path_factory.mktemp("kv_file") / "model.gguf", **MODEL)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaModel]:
    with loaded(model_path) as opened:
        yield opened


def write_file(model: LlamaModel, path: Path) -> NDArray[np.float32]:
    """A complete file of TOKENS; the logits of FURTHER after it."""
    with open_session(model, RETRIEVAL) as session:
        kvfile.begin(session, path, TOKENS, np.zeros(len(TOKENS)), SECTION, checkpoint_tokens=64)
        session.decode(TOKENS)
        kvfile.end(session)
        return continued(session)


def continued(session: object) -> NDArray[np.float32]:
    rows = [session.decode(FURTHER[:20], n_logits=1)]  # type: ignore[attr-defined]
    rows += [session.decode([token], phase="decode", n_logits=1) for token in FURTHER[20:]]  # type: ignore[attr-defined]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def data(model: LlamaModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("kv_file") / "a.akv"
    write_file(model, path)
    return path.read_bytes()


def use(model: LlamaModel, path: Path) -> NDArray[np.float32]:
    """What the file's session answers, whatever the file claims to be of."""
    with kvfile.open_session(model, path, n_ctx=1024, n_threads=1) as session:
        if session.n_past < len(TOKENS):  # the beginning of the reading is a valid file, too
            session.decode(TOKENS[session.n_past :])
        return continued(session)


def refuse(model: LlamaModel, path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    with pytest.raises(StateError, match=match) as caught:
        use(model, path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_the_layout_is_as_described(model: LlamaModel, data: bytes, tmp_path: Path) -> None:
    """Breaks when the description in file.h is no longer true."""
    layout = layout_of(data)
    assert data[:8] == b"AKVFILE\0"
    assert struct.unpack_from("<II", data, 8) == (3, N_PARAMS)
    assert layout.end == len(data)
    assert (layout.n_tokens, layout.n_section, layout.n_layer) == (len(TOKENS), len(SECTION), MODEL["n_layer"])
    assert struct.unpack_from("<Q", data, HEADER)[0] == checksum(data[:HEADER])
    tokens = data[layout.tokens :][: 5 * len(TOKENS)]
    np.testing.assert_array_equal(np.frombuffer(tokens[: 4 * len(TOKENS)], np.int32), TOKENS)
    assert struct.unpack_from("<Q", data, layout.tokens + len(tokens))[0] == checksum(tokens)
    assert data[layout.section :][: len(SECTION) + 8] == SECTION + struct.pack("<Q", checksum(SECTION))
    for i in range(2):
        at = layout.slot(i)
        magic, _, n_done, n_closed, table, complete, _, payload = struct.unpack_from("<8sQqqQIIQ", data, at)
        assert (magic, n_done, complete) == (b"AKVSLOT\0", 240, 1)
        assert struct.unpack_from("<Q", data, at + 56 + payload)[0] == checksum(data[at : at + 56 + payload])
        rows = data[layout.table :][: 4 * N_ARRAYS * n_closed * layout.n_layer]
        assert table == checksum(rows)
        for layer in range(layout.n_layer):
            for which, n in enumerate(layout.chunk_bytes):
                for chunk in range(layout.n_kept(which, n_closed)):
                    value = checksum(data[layout.array(layer, which) + chunk * n :][:n])
                    row = struct.unpack_from("<I", rows, 4 * ((chunk * layout.n_layer + layer) * N_ARRAYS + which))[0]
                    assert row == (value ^ value >> 32) & 0xFFFFFFFF
    path = tmp_path / "signed.akv"
    path.write_bytes(with_slots(with_header(data, 0, b""), 0, b""))  # the tools of the forgeries change nothing
    assert path.read_bytes() == data


def test_truncated_or_longer(model: LlamaModel, data: bytes, tmp_path: Path) -> None:
    """Breaks when a file that was not copied whole is taken."""
    n, path = len(data), tmp_path / "a.akv"
    for length in (0, 1, 7, 8, HEADER):
        refuse(model, path, data[:length], "not a KV file")
    for length in (HEADER + 8, 4096, ALIGN, ALIGN + 1, n // 2, n - ALIGN, n - 1):
        refuse(model, path, data[:length], f"truncated: it has {length} bytes, expected {n}")
    refuse(model, path, data + b"\0", f"expected {n}")


def test_not_a_kv_file(model: LlamaModel, model_path: Path, data: bytes, tmp_path: Path) -> None:
    """Breaks when something else altogether, or a file of a later version, is not named as such."""
    path = tmp_path / "a.akv"
    for other in (b"text " * 1000, bytes(len(data)), model_path.read_bytes()):
        refuse(model, path, other, "not a KV file of actqkv")
    refuse(model, path, with_header(data, 8, struct.pack("<I", 99)), "version 99, expected 3: index the document again")


@pytest.mark.parametrize("name", [name for name in OTHER_MODELS if name != "another type"])
def test_another_model(name: str, data: bytes, tmp_path: Path) -> None:
    """Breaks when a file is taken by a model that did not make it."""
    other = tiny.make_tiny_gguf(tmp_path / "model.gguf", **MODEL | OTHER_MODELS[name])
    with loaded(other) as model:
        refuse(model, tmp_path / "a.akv", data, "another model")


def test_damage_in_every_part(model: LlamaModel, data: bytes, tmp_path: Path) -> None:
    """Breaks when one changed byte of some part goes unnoticed."""
    layout, path = layout_of(data), tmp_path / "a.akv"
    n_closed = struct.unpack_from("<q", data, layout.slots + 24)[0]

    def damaged(*at: int) -> bytes:
        changed = bytearray(data)
        for i in at:
            changed[i] ^= 0x10
        return bytes(changed)

    for at in (16, 30, 60, 100, HEADER - 9, HEADER):
        refuse(model, path, damaged(at), "damaged: the checksum of its header")
    refuse(model, path, damaged(layout.tokens + 17), "damaged: the checksum of its tokens")
    refuse(
        model, path, damaged(layout.slot(0) + 100, layout.slot(1) + 100), "damaged: the checksums of its checkpoints"
    )
    refuse(model, path, damaged(layout.table + 3), "damaged: the checksum of its table")
    for layer in range(layout.n_layer):
        for which, n in enumerate(layout.chunk_bytes[:INDEX]):
            at = layout.array(layer, which) + (n_closed // 2) * n
            changed = damaged(*(at + chunk * n for chunk in range(-3, 3)))  # of a few: which are attended is not known
            path.write_bytes(changed)
            with pytest.raises(StateError, match=f"of layer {layer} is not what was written"):
                kvfile.verify(path)
            if which in {2, 3}:  # read as a whole by every step
                refuse(model, path, changed, f"of layer {layer} is not what was written")
    path.write_bytes(damaged(layout.section + 3))
    for check in (kvfile.read, kvfile.verify):
        with pytest.raises(StateError, match="the checksum of its document"):
            check(path)
    assert kvfile.info(path).complete


@pytest.mark.parametrize("array", range(INDEX))
def test_damage_is_not_saved_as_sound(model: LlamaModel, data: bytes, array: int, tmp_path: Path) -> None:
    """Breaks when a damaged chunk that nothing has read goes into another file with a checksum that fits it."""
    at, path = layout_of(data).array(1, array), tmp_path / "a.akv"
    path.write_bytes(put(data, at, bytes([data[at] ^ 1])))
    with kvfile.open_session(model, path, n_ctx=1024, n_threads=1) as session:
        kvfile.begin(session, tmp_path / "b.akv", TOKENS, np.zeros(len(TOKENS)), SECTION, checkpoint_tokens=64)
        with pytest.raises(StateError, match=r"a\.akv is damaged"):
            kvfile.end(session)


def test_damage_to_one_slot_is_survived(model: LlamaModel, data: bytes, tmp_path: Path) -> None:
    """Breaks when the second copy of the checkpoint is not used."""
    path = tmp_path / "a.akv"
    path.write_bytes(data)
    expected = use(model, path)
    for i in range(2):
        path.write_bytes(put(data, layout_of(data).slot(i) + 60, bytes(64)))
        np.testing.assert_array_equal(use(model, path), expected)


# ---- any damage, and forgeries, in a child process


def mutations(data: bytes, n: int) -> Iterator[bytes]:
    """Damage in parts that are in use: bytes, stretches of zeros, stretches moved."""
    rng = np.random.default_rng(0)
    layout = layout_of(data)
    used = [
        (0, HEADER + 8),
        (layout.tokens, 5 * layout.n_tokens + 8),
        (layout.table, 4 * N_ARRAYS * layout.n_chunks * 2),
    ]
    used += [(layout.slot(i), layout.slot_bytes) for i in range(2)]
    used += [
        (layout.array(layer, which), layout.n_chunks * size)
        for layer in range(layout.n_layer)
        for which, size in enumerate(layout.chunk_bytes[:INDEX])
    ]
    for i in range(n):
        changed = bytearray(data)
        for _ in range(1 + i % 3):
            start, length = used[rng.integers(len(used))]
            at, size = start + int(rng.integers(length)), int(rng.integers(1, 200))
            if i % 4 == 0:
                changed[at : at + size] = bytes(len(changed[at : at + size]))
            elif i % 4 == 1:
                other = int(rng.integers(len(data) - size))
                changed[at : at + size] = data[other : other + len(changed[at : at + size])]
            else:
                changed[at] = int(rng.integers(256))
        yield bytes(changed)


def forged_headers(data: bytes, n: int) -> Iterator[bytes]:
    """Every number of the header and of its parameters replaced by extreme ones, with a checksum to match."""
    words = [(at, "<q") for at in (16, 24, 32, 40, 48, *range(64, AT_PARAMS, 8))]
    words += [(at, "<i") for at in (12, 56, 60, *range(AT_PARAMS + 32, AT_PARAMS + N_PARAMS, 4))]
    for at, kind in words:
        bits = 8 * struct.calcsize(kind)
        (number,) = struct.unpack_from(kind, data, at)
        for value in {-1, 0, 1, 2, number - 1, number + 1, 2 * number, 1 << 20, 1 << (bits - 2), (1 << (bits - 1)) - 1}:
            yield with_header(data, at, struct.pack(kind, max(min(value, (1 << (bits - 1)) - 1), -(1 << (bits - 1)))))


def forged_slots(data: bytes, n: int) -> Iterator[bytes]:
    """Numbers of slots replaced, and random bytes in their payload, with checksums to match."""
    rng = np.random.default_rng(1)
    layout = layout_of(data)
    (payload,) = struct.unpack_from("<Q", data, layout.slots + 48)
    for at in (16, 24):
        for value in (-1, 0, 1, 16, 64, 200, 239, 241, 250, 1 << 20, 1 << 62):
            yield with_slots(data, at, struct.pack("<q", value))
    for value in (2, WORD & 0xFFFFFFFF):
        yield with_slots(data, 40, struct.pack("<I", value))
    for i in range(n):
        at = 56 + int(rng.integers(payload if i % 2 else min(payload, 4000)))
        yield with_slots(data, at, bytes(rng.integers(0, 256, min(8, 56 + payload - at), np.uint8)))


FORGERIES: dict[str, Callable[[bytes, int], Iterator[bytes]]] = {
    "damage": mutations,
    "headers": forged_headers,
    "slots": forged_slots,
}


def try_files(model_path: str, folder: str, kind: str, n: int) -> None:
    """Use every file, and print how many were refused, equal to the undamaged one, and otherwise. Runs in a child."""
    counts = {"refused": 0, "equal": 0, "other": 0}
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    path = Path(folder) / "a.akv"
    with loaded(Path(model_path)) as model:
        expected = write_file(model, path)
        for forged in FORGERIES[kind](path.read_bytes(), n):
            path.unlink()
            path.write_bytes(forged)
            try:
                found = use(model, path)
                counts["equal" if np.array_equal(found, expected) else "other"] += 1
            except (ActqkvError, MemoryError):
                counts["refused"] += 1
    print(*counts.values())


@pytest.mark.parametrize(
    ("kind", "n"),
    [("damage", 300), ("headers", 0), ("slots", 150), pytest.param("damage", 10000, marks=pytest.mark.slow)],
)
def test_any_file(kind: str, n: int, model_path: Path, tmp_path: Path) -> None:
    """Breaks when a file crashes the process or hangs it; or when damage, as against forgery, changes an answer."""
    shared = Path("/dev/shm")
    with_folder = str(tmp_path if not shared.is_dir() else shared / f"actqkv-{os.getpid()}")
    Path(with_folder).mkdir(exist_ok=True)
    try:
        code = f"import test_kv_file_errors as t; t.try_files({str(model_path)!r}, {with_folder!r}, {kind!r}, {n})"
        said = in_child(code, timeout=120 + n)
    finally:
        for file in Path(with_folder).glob("*.akv*"):
            file.unlink()
        Path(with_folder).rmdir()
    refused, _, other = map(int, said.split())
    assert refused > 0
    assert other == 0 or kind != "damage"  # what matches its checksums was made so on purpose
