"""Which model a file holds: digests of a GGUF file's metadata, tensor table and samples of its weights.

KV files name the model that read them. Norms, metadata and shapes are the same in every quantisation of one model, so
that another quantisation is told from another model. Digests are remembered per file, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from actqkv_cpp import _env
from actqkv_cpp.errors import ModelError
from actqkv_cpp.files import written_atomically

_MEMORY = "models.json"
_REMEMBERED = 100  # models, the latest
_SAMPLE_BYTES = 1024
_DIGEST_CHARS = 32
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by gguf type
_STRING, _ARRAY, _F32 = 8, 9, 0
# What quantising changes, or splitting a file.
_VOLATILE = re.compile(r"general\.(file_type|quantization_version|alignment)$|quantize\.|split\.")


@dataclass(frozen=True)
class Identity:
    """`exact` is of one file's weights, `family` of all quantisations of a model, `tokenizer` of its vocabulary."""

    name: str
    exact: str
    family: str
    tokenizer: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def of_model(path: str | Path) -> Identity:
    """The identity of the model in a GGUF file, or in all files of a split one.

    Raises:
        ModelError: the file cannot be read as GGUF.

    Example:
        >>> of_model("model.gguf").name
        'Llama 3.2 1B'
    """
    files = _files(Path(path))
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    key = "\n".join(f"{f.resolve()} {s.st_size} {s.st_mtime_ns}" for f, s in zip(files, found, strict=True))
    memory = _env.cache_dir() / _MEMORY
    remembered = _remembered(memory)
    if key in remembered:
        return remembered[key]
    try:
        identity = _digest(files)
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from None
    known = dict([*remembered.items(), (key, identity)][-_REMEMBERED:])
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(memory) as temporary:
            temporary.write_text(json.dumps({k: v.to_json() for k, v in known.items()}, indent=1))
    return identity


def _remembered(memory: Path) -> dict[str, Identity]:
    try:
        return {key: Identity(**value) for key, value in json.loads(memory.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _files(path: Path) -> list[Path]:
    """The file, or all files of the split model that it is the first of."""
    split = _SPLIT.fullmatch(path.name)
    return [path] if split is None else sorted(path.parent.glob(f"{split[1]}-?????-of-{split[2]}.gguf"))


def _digest(files: list[Path]) -> Identity:
    exact, family, tokenizer = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    name = ""
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            gguf = _Gguf(data)
            for key, value in gguf.metadata():
                exact.update(key + value)
                if not _VOLATILE.match(key.decode("utf-8", "replace")):
                    family.update(key + value)
                if key.startswith(b"tokenizer."):
                    tokenizer.update(key + value)
                if key == b"general.name":
                    name = value[12:].decode("utf-8", "replace")
            for shape, kind, sample, is_kept in gguf.tensors():
                exact.update(shape + kind + sample)
                family.update(shape + (sample if is_kept else b""))
    digests = (digest.hexdigest()[:_DIGEST_CHARS] for digest in (exact, family, tokenizer))
    return Identity(name or files[0].stem, *digests)


class _Gguf:
    """A walk through a GGUF file, front to back."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._at = 4
        self._version, self._n_tensors, self._n_keys = self._numbers("<IQQ")
        self._alignment = 32

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return found

    def _string(self) -> bytes:
        (length,) = self._numbers("<Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at])

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            (length,) = self._numbers("<Q")
            self._at += length
        elif kind == _ARRAY:
            of, count = self._numbers("<IQ")
            if of in _SCALAR_BYTES:
                self._at += count * _SCALAR_BYTES[of]
            else:
                for _ in range(count):
                    self._skip(of)
        else:
            self._at += _SCALAR_BYTES[kind]

    def metadata(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys, and values as they stand in the file, type included."""
        for _ in range(self._n_keys):
            key, begin = self._string(), self._at
            (kind,) = self._numbers("<I")
            self._skip(kind)
            value = bytes(self._data[begin : self._at])
            if key == b"general.alignment":
                (self._alignment,) = struct.unpack_from("<I", value, 4)
            yield key, value

    def tensors(self) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
        """Of each tensor: its name and shape; its type; a sample of its data; and whether quantising keeps it, as it
        does norms and biases, of which the sample is all."""
        rows = []
        for _ in range(self._n_tensors):
            name = self._string()
            (n_dims,) = self._numbers("<I")
            dims = self._numbers(f"<{n_dims}Q")
            rows.append((name, dims, *self._numbers("<IQ")))
        begin = -(-self._at // self._alignment) * self._alignment
        ends = sorted({offset for *_, offset in rows} | {len(self._data) - begin})
        following = dict(pairwise(ends))
        for name, dims, kind, offset in sorted(rows):
            first, last = begin + offset, begin + following.get(offset, offset)
            is_kept = len(dims) == 1 and kind == _F32
            if is_kept:
                sample = bytes(self._data[first : first + 4 * dims[0]])
            else:
                sample = b"".join(self._data[at : min(at + _SAMPLE_BYTES, last)] for at in (first, (first + last) // 2))
            yield name + struct.pack(f"<{len(dims)}Q", *dims), struct.pack("<I", kind), sample, is_kept
