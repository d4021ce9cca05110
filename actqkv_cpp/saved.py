"""Documents in KV files: what stands in a file's section beside the keys and values, and readings that write a file.

The section, little-endian: u64 n, n bytes of JSON, then for each span of the JSON its ends as i64. The JSON holds the
documents (`TextFile.to_json`), the model's identity, the files on disk with their digests, and the Reading: texts
around the documents, where the documents lie, the cursor behind them. Tokens are the library's part of the file.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import identity, kvfile, machine
from actqkv_cpp._native import Session, methods
from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import Cancelled, KVFileError, StateError
from actqkv_cpp.figures import FileInfo, Params
from actqkv_cpp.files import written_atomically
from actqkv_cpp.identity import Identity
from actqkv_cpp.origin import HASH_CHARS, Origin
from actqkv_cpp.reader import TextFile
from actqkv_cpp.reading import QUESTION, Place, Reading
from actqkv_cpp.template import Cursor, Part, Span, Step, Tokens

if TYPE_CHECKING:
    from actqkv_cpp.llama import Llama

_PHASES = {"prefill": 0, "decode": 1, "question": 2}  # enum actqkv_phase
_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a KV file's section says."""

    model: Identity
    files: tuple[TextFile, ...]
    reading: Reading


# ---- the section


def encode(model: Identity, files: tuple[TextFile, ...], reading: Reading) -> bytes:
    """The section of a reading from the beginning of a session."""
    found = {
        "format": _FORMAT,
        "model": model.to_json(),
        "files": [file.to_json() for file in files],
        "origins": [file.origin and asdict(file.origin) for file in files],
        "place": _place_json(reading.place),
        "closing": _parts_json(reading.closing),
        "done": _place_json(reading.done),
        "spans": [[span.document, span.start, len(span.ends)] for span in reading.step.spans],
        "seconds": reading.seconds,
    }
    text = json.dumps(found).encode()
    ends = (span.ends.astype("<i8").tobytes() for span in reading.step.spans)
    return b"".join((struct.pack("<Q", len(text)), text, *ends))


def decode(section: bytes, tokens: Tokens) -> Saved:
    """What `encode` was given; tokens: of the whole reading.

    Raises:
        StateError: the section is of another version, or its parts do not fit each other.
    """
    try:
        (n_json,) = struct.unpack_from("<Q", section)
        found = json.loads(section[8 : 8 + n_json])
        if found["format"] != _FORMAT:
            raise StateError(
                f"the KV file's document has format {found['format']}, expected {_FORMAT}", "index the document again"
            )
        return _saved(found, section[8 + n_json :], tokens)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"the KV file's document is inconsistent: {error}", "index the document again") from None


def _saved(found: dict[str, Any], ends: bytes, tokens: Tokens) -> Saved:
    files = tuple(
        replace(TextFile.from_json(file), origin=origin and Origin(**origin))
        for file, origin in zip(found["files"], found["origins"], strict=True)
    )
    spans = _spans(found["spans"], ends, files, len(tokens))
    kept = tuple(span for span in spans if span.document != QUESTION)
    done = _place(found["done"], tokens, files, kept)
    place = _place(found["place"], tokens[:0], (), ())
    step = Step(0, tokens, done.cursor, spans)
    if done.cursor.n_past != len(tokens) or place.cursor.n_past:
        raise ValueError("the reading does not end with its tokens")
    if not files or not kept:
        raise ValueError("documents are missing")
    model = Identity(**found["model"])
    if not all(isinstance(value, str) for value in asdict(model).values()):
        raise ValueError("the model is not named")
    reading = Reading(place, _parts(found["closing"]), step, done, seconds=float(found["seconds"]))
    return Saved(model, files, reading)


def _spans(rows: list[list[int]], data: bytes, files: tuple[TextFile, ...], n_tokens: int) -> tuple[Span, ...]:
    numbers: NDArray[np.int64] = np.frombuffer(data, "<i8")
    if any(type(number) is not int for row in rows for number in row) or sum(n for _, _, n in rows) != len(numbers):
        raise ValueError("the ends of its tokens are missing")
    spans, at = [], 0
    for document, start, n in rows:
        ends = numbers[at : at + n].astype(np.int64)
        at += n
        n_bytes = len(files[document].text.encode()) if document != QUESTION else int(ends[-1:].sum())
        inside = n > 0 and start >= 0 and start + n <= n_tokens and ends[0] >= 0 and ends[-1] <= n_bytes
        if not inside or document < QUESTION or (np.diff(ends) < 0).any():
            raise ValueError(f"document {document} does not lie among its tokens")
        spans.append(Span(document, start, ends))
    return tuple(spans)


def _parts_json(parts: tuple[Part, ...]) -> list[Any]:
    return [[part.text, part.template] for part in parts]


def _parts(rows: list[Any]) -> tuple[Part, ...]:
    if not all(isinstance(text, str) and isinstance(template, bool) for text, template in rows):
        raise TypeError("its texts are none")
    return tuple(Part(text, template=template) for text, template in rows)


def _place_json(place: Place) -> dict[str, Any]:
    cursor = place.cursor
    return {
        "cursor": [cursor.n_past, cursor.run_text, len(cursor.run_tokens)],
        "before": _parts_json(place.before),
        "after": _parts_json(place.after),
    }


def _place(found: dict[str, Any], tokens: Tokens, files: tuple[TextFile, ...], spans: tuple[Span, ...]) -> Place:
    n_past, text, n_run = found["cursor"]
    if not (isinstance(text, str) and type(n_past) is int and type(n_run) is int and 0 <= n_run <= n_past):
        raise TypeError("its cursor is none")
    run = tokens[n_past - n_run : n_past]
    return Place(Cursor(n_past, text, run), _parts(found["before"]), _parts(found["after"]), files, spans)


# ---- files of readings


def texts(path: str | Path) -> tuple[TextFile, ...]:
    """The documents of a KV file, to be read again: its keys and values hold only for a session that begins with it.

    Raises:
        KVFileError, StateError: as `kvfile.info`.
    """
    tokens, _, section = kvfile.read(path)
    return decode(section, tokens).files


def begin(llm: Llama, path: str | Path, files: tuple[TextFile, ...], reading: Reading) -> None:
    """Have the session of `llm` write `reading` to a new KV file as it goes on.

    Raises:
        KVFileError: the file cannot be made, or its disk has no room for it.
    """
    plan, n_ctx = llm._native_session("a KV file").plan, llm.n_ctx()
    _check_disk(path, plan.file_bytes(n_ctx, reading.n_total))
    phases = np.concatenate([np.full(len(t), _PHASES[phase], np.int8) for t, phase in reading.all_segments()])
    section = encode(identity.of_model(llm.model_path), files, reading)
    kvfile.begin(
        llm._native_session("a KV file"),
        path,
        reading.step.tokens,
        phases,
        section,
        checkpoint_tokens=kvfile.CHECKPOINT_TOKENS,
    )


def _check_disk(path: str | Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(Path(path).parent).free
    except OSError:  # what is wrong is said when the file is made
        return
    if needed > free:
        raise KVFileError(
            f"{path} takes {needed:,} bytes, {free:,} are free on its disk", "free some, or use a smaller kv_type"
        )


def save(llm: Llama, path: str | Path, files: tuple[TextFile, ...], reading: Reading) -> None:
    """Write `reading`, of which the session of `llm` holds `n_read` tokens, to a file in place of `path`."""
    session = llm._native_session("a KV file")
    target = Path(path)
    try:
        with written_atomically(target) as temporary:
            begin(llm, temporary, files, reading)
            try:
                (kvfile.end if reading.n_read == reading.n_total else kvfile.sync)(session)
            finally:
                kvfile.leave(session)
    except KVFileError as error:
        names = f"{target.name}.{os.getpid()}.tmp"
        raise KVFileError(str(error).replace(names, target.name), error.hint) from None
    except OSError as error:
        raise KVFileError(f"cannot make {target}: {error.strerror}", "check the path and its permissions") from None


def load(path: str | Path, model_path: str | Path) -> tuple[FileInfo, Saved]:
    """What a KV file says, checked against the model.

    Warns where the file was read by another quantisation of the model, or its document has changed since.

    Raises:
        StateError: another model read it; or as `kvfile.info`.
    """
    info = kvfile.info(path)
    tokens, _, section = kvfile.read(path)
    saved = decode(section, tokens)
    here = identity.of_model(model_path)
    if here.exact != saved.model.exact:
        if (here.family, here.tokenizer) != (saved.model.family, saved.model.tokenizer):
            raise StateError(
                f"{path} was read by another model: {saved.model.name} ({saved.model.exact[:HASH_CHARS]}), "
                f"this is {here.name} ({here.exact[:HASH_CHARS]})",
                "use the model that read it, or index the document with this one",
            )
        warnings.warn(
            f"{path} was read by another quantisation of {here.name}: answers may differ from those of a reading by "
            "this one",
            stacklevel=4,
        )
    for file in saved.files:
        if file.origin is not None and (change := file.origin.change()):
            warnings.warn(f"{change}; {path} holds it as it was then", stacklevel=4)
    return info, saved


def answering(reading: Params, wanted: Retrieval | None) -> Retrieval:
    """The Retrieval that answers from a file: `wanted`, at the reading's positions; by default that of the reading."""
    if wanted is None:
        sizes: dict[str, Any] = {name: getattr(reading, name) for name in ("budget", "n_sink", "n_local")}
        return Retrieval(reading.method, window=reading.n_window, **sizes, **reading.columns)
    if (wanted.positions or methods()[wanted.method]["positions"]) == "auto":
        return replace(wanted, positions=reading.columns["positions"])
    return wanted


def open_reading(llm: Llama, path: str | Path) -> Reading:
    """The reading of a KV file, in a session that takes the place of that of `llm`; see `Llama.open`."""
    n_ctx, n_threads = llm.n_ctx(), llm._native_session("a KV file").params.n_threads
    info, found = load(path, llm.model_path)
    plan = kvfile.plan(llm._model, path, n_ctx=n_ctx, n_threads=n_threads)
    machine.check_memory(plan, n_ctx, n_in_file=info.n_tokens)
    session = kvfile.open_session(llm._model, path, n_ctx=n_ctx, n_threads=n_threads)
    try:
        retrieval = answering(info.params, llm._retrieval)
        session.set_answering(retrieval)
    except BaseException:
        session.close()
        raise
    llm._take_session(session)
    llm.retrieval = llm._answering = retrieval
    llm._has_opened = True
    _stand(llm, found.reading)
    return found.reading


def leave_opened(llm: Llama) -> None:
    """Give `llm` a session by its own method again, after one by that of a file's reading."""
    params = llm._native_session("reading").params
    llm.retrieval = llm._answering = llm._retrieval if llm._retrieval is not None else Retrieval()
    sizes = {"n_ctx": params.n_ctx, "n_threads": params.n_threads}
    llm._take_session(Session(llm._model, llm.retrieval, kv_type=llm.kv_type, **sizes))
    llm._has_opened = False


def _stand(llm: Llama, reading: Reading) -> None:
    """`reading` is read as far as the session of `llm` holds it."""
    reading.n_read, reading.history = llm.n_tokens, llm.input_ids[: llm.n_tokens].copy()


@contextmanager
def written(llm: Llama, reading: Reading) -> Iterator[None]:
    """Within the block the session of `llm` writes `reading` to the KV file that `llm` was given, if any, and keeps it
    there instead of in memory. Where the file holds the reading's beginning, the session starts with that. What stands
    behind something else in the session, or on another file that was opened, is not written."""
    path = llm.kv_file
    if path is None or reading.step.keep or llm._has_opened:
        yield
        return
    session = llm._native_session("a KV file")
    machine.check_memory(session.plan, llm.n_ctx(), n_in_file=reading.n_total)
    if not path.exists():
        begin(llm, path, reading.done.files, reading)
    else:
        info, found = load(path, llm.model_path)
        check_same(path, found, info, reading, session.params)
        n_threads, write = session.params.n_threads, not info.complete
        session = kvfile.open_session(llm._model, path, n_ctx=llm.n_ctx(), n_threads=n_threads, write=write)
        llm._take_session(session)
        _stand(llm, reading)
        if info.complete:
            yield
            return
    kvfile.spill(session)
    try:
        yield
        kvfile.end(session)
    except (Cancelled, KeyboardInterrupt):
        kvfile.sync(session)
        raise
    finally:
        if not session.closed:
            kvfile.leave(session)


def check_same(path: str | Path, found: Saved, info: FileInfo, reading: Reading, params: Params) -> None:
    """StateError where a KV file is not of `reading` under `params`, and so cannot be gone on with."""
    hint = "name another file, or remove this one"
    for old, new in zip(found.files, reading.done.files, strict=False):
        if (then := old.sha256) != (now := new.sha256):
            what = f"{old.name} {then[:HASH_CHARS]} in it, {new.name} {now[:HASH_CHARS]} given"
            raise StateError(f"{path} is of another text: {what}", hint)
    same_tokens = np.array_equal(found.reading.step.tokens, reading.step.tokens)
    if len(found.files) != len(reading.done.files) or not same_tokens:
        raise StateError(f"{path} is of another reading: other documents, system text or question", hint)
    differences = [
        f"{field.name} is {getattr(params, field.name)}, in the file {getattr(info.params, field.name)}"
        for field in fields(Params)
        if field.name not in {"columns", "n_ctx", "n_threads"}
        and getattr(params, field.name) != getattr(info.params, field.name)
    ]
    differences += [
        f"{name} is {value}, in the file {info.params.columns[name]}"
        for name, value in params.columns.items()
        if value != info.params.columns[name]
    ]
    if differences:
        raise StateError(f"{path} was read otherwise: {', '.join(differences)}", hint)
