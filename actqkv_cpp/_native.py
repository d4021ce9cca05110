"""The only importer of actqkv_cpp._actqkv: sessions over loaded models, with exceptions, locks and callbacks.

A call into the library releases the GIL. A session is used by one thread at a time; a second thread gets ThreadError
at once. Signals are handled when the progress callback enters Python, at the end of every window, so Ctrl-C stops a
long reading there and keeps the windows that were completed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, get_args

import llama_cpp  # first: its libllama and ggml must be the ones that our module binds to
import numpy as np
from numpy.typing import NDArray

from actqkv_cpp import lifetime
from actqkv_cpp.config import Retrieval
from actqkv_cpp.errors import LibraryError, ParameterError, StateError, ThreadError, error_from_status, unknown_name
from actqkv_cpp.figures import GpuStats, Mass, MemoryPlan, Params, Phase, Stage, Stats
from actqkv_cpp.recording import Record

try:
    from actqkv_cpp._actqkv import ffi, lib
except ImportError as cause:
    in_sources = (Path(__file__).parents[1] / "CMakeLists.txt").exists()
    raise LibraryError(
        f"the native module of actqkv does not load: {cause}",
        "this is the source folder, which hides an installed actqkv: run Python elsewhere, or pip install -e ."
        if in_sources
        else "pip install --force-reinstall --no-cache-dir actqkv",
    ) from cause

ProgressFn: TypeAlias = Callable[[int, int], object]
ObserverFn: TypeAlias = Callable[[str, int, int, NDArray[np.float32]], object]
RecordFn: TypeAlias = Callable[[Record], object]

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type, stable since GGUF files store it

_PHASES: dict[Phase, int] = {name: getattr(lib, f"ACTQKV_{name.upper()}") for name in get_args(Phase)}
_PHASE_NAMES: dict[int, Phase] = {value: name for name, value in _PHASES.items()}
_STATUS_NAMES = {getattr(lib, name): name for name in dir(lib) if name.startswith("ACTQKV_ERR_")}

# Column of struct actqkv_method -> prefix of its enum's names; and the columns that Retrieval shortens.
_ENUMS = {
    "positions": "ACTQKV_POSITIONS_",
    "prefill": "ACTQKV_RETRIEVE_",
    "decode": "ACTQKV_RETRIEVE_",
    "summary": "ACTQKV_SUMMARY_",
    "probe": "ACTQKV_PROBE_",
    "statistics": "ACTQKV_STATISTICS_",
    "score": "ACTQKV_SCORE_",
    "cutoff": "ACTQKV_CUTOFF_",
    "summary_keys": "ACTQKV_KEYS_",
    "granularity": "ACTQKV_GRANULARITY_",
    "vote": "ACTQKV_VOTE_",
}
_COLUMNS = {"representatives": "n_representatives", "dense_layers": "n_dense_layers", "chunk": "n_chunk_tokens"}
_SIZES = {"budget": "budget", "n_sink": "n_sink", "n_local": "n_local", "window": "n_window"}
_NUMBERS = ("probe_warmup", "statistics_cap", "scan", "refine", "cutoff_temperature", "question_weight")

# What one observed array looks like: the number of dimensions that count, by name (actqkv.h, actqkv_observe_fn).
_OBSERVED_DIMS = {"q": 3, "k": 3, "v": 3, "out": 2, "head_scores": 2, "votes": 2, "plans": 2, "mass": 2}


# ---- libraries of the process


def _check_one_copy() -> None:
    """LibraryError when two files of libllama or libggml-base are mapped: their tensors and models do not mix."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # macOS: install names are absolute there, so a second copy cannot be picked up
        return
    mapped = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count("/")}
    for library in ("libllama.so", "libggml-base.so"):
        files = sorted(path for path in mapped if Path(path).name.startswith(library))
        if len(files) > 1:
            raise LibraryError(
                f"two copies of {library} are loaded: {' and '.join(files)}",
                "import actqkv_cpp before other packages that bring their own llama.cpp, or use another process",
            )


_check_one_copy()


# ---- errors


def check(status: int, error: Any) -> None:
    """Raise the exception of `status`, with the message in `error` (struct actqkv_error *); nothing for ACTQKV_OK."""
    if status != lib.ACTQKV_OK:
        message = ffi.string(error.message).decode("utf-8", "replace")
        raise error_from_status(_STATUS_NAMES.get(status, f"status {status}"), message)


def call(function: Any, *arguments: Any) -> None:
    error = ffi.new("struct actqkv_error *")
    check(function(*arguments, error), error)


def _text(chars: Any) -> str:
    return str(ffi.string(chars).decode("utf-8", "replace"))


# ---- methods and parameters


def _enum_value(column: str, name: str) -> int:
    value: int = getattr(lib, _ENUMS[column] + name.upper())
    return value


def _enum_name(column: str, value: int) -> str:
    prefix = _ENUMS[column]
    for name in dir(lib):
        if name.startswith(prefix) and getattr(lib, name) == value:
            return name.removeprefix(prefix).lower()
    return str(value)


def _method_columns(row: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {name: _enum_name(name, getattr(row, name)) for name in _ENUMS}
    columns |= {ours: getattr(row, theirs) for ours, theirs in _COLUMNS.items()}
    return columns | {name: getattr(row, name) for name in _NUMBERS}


def methods() -> dict[str, dict[str, Any]]:
    """The native table: name of each method -> its columns, by the names that `Retrieval` has for them.

    Example:
        >>> methods()["actqkv"]["score"]
        'dot'
    """
    row = ffi.new("struct actqkv_method *")
    table: dict[str, dict[str, Any]] = {}
    for i in range(lib.actqkv_method_table(0, ffi.NULL)):
        lib.actqkv_method_table(i, row)
        table[_text(row.name)] = _method_columns(row)
    return table


def make_params(retrieval: Retrieval, *, n_ctx: int, n_threads: int, kv_type: str) -> Any:
    """struct actqkv_params *, the method's row with the columns that `retrieval` overrides."""
    if kv_type not in KV_TYPES:
        raise unknown_name("kv_type", kv_type, KV_TYPES)
    if retrieval.method not in (known := methods()):
        raise unknown_name("method", retrieval.method, known)
    params = ffi.new("struct actqkv_params *", lib.actqkv_default_params())
    call(lib.actqkv_method_find, retrieval.method.encode(), ffi.addressof(params, "method"))
    for name in _ENUMS:
        if (value := getattr(retrieval, name)) is not None:
            setattr(params.method, name, _enum_value(name, value))
    for ours, theirs in (_COLUMNS | {name: name for name in _NUMBERS}).items():
        if (value := getattr(retrieval, ours)) is not None:
            set_number(params.method, theirs, value)
    for ours, theirs in _SIZES.items():
        set_number(params, theirs, getattr(retrieval, ours))
    set_number(params, "n_ctx", n_ctx)
    set_number(params, "n_threads", n_threads)
    params.kv_type = KV_TYPES[kv_type]
    return params


def set_number(struct: Any, name: str, value: float) -> None:
    try:
        setattr(struct, name, value)
    except OverflowError as cause:
        raise ParameterError(f"{name} is {value}, expected at most {2**31 - 1} either way") from cause
    except TypeError as cause:
        raise ParameterError(f"{name} is {value!r}, expected a whole number") from cause


def found_params(found: Any) -> Params:
    sizes = {name: getattr(found, name) for name in ("n_ctx", "n_threads", *_SIZES.values())}
    kv_type = next((name for name, value in KV_TYPES.items() if value == found.kv_type), str(found.kv_type))
    return Params(_text(found.method.name), _method_columns(found.method), kv_type=kv_type, **sizes)


def _plain(struct: Any, kind: type[Any]) -> Any:
    """A cffi struct as the dataclass `kind` of the same field names; structs in it as those of their kind."""
    values = {field.name: getattr(struct, field.name) for field in dataclasses.fields(kind)}
    inner = {"gpu": GpuStats}  # the others are stages
    return kind(**{k: _plain(v, inner.get(k, Stage)) if isinstance(v, ffi.CData) else v for k, v in values.items()})


def model_pointer(model: Any) -> Any:
    if model.model is None:
        raise StateError("the model is closed")
    return ffi.cast("struct llama_model *", model.model)


def model_check(model: Any) -> None:
    """Raise ModelError, with the reason, when our graph cannot compute this model (a llama_cpp LlamaModel) exactly."""
    call(lib.actqkv_model_check, model_pointer(model))


def memory_plan(
    model: Any, retrieval: Retrieval, *, n_ctx: int, n_threads: int = 1, kv_type: str = "f16"
) -> MemoryPlan:
    """What a session over `model` would need; checks the parameters as `Session` does and allocates nothing."""
    return native_plan(model, make_params(retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type))


def native_plan(model: Any, params: Any) -> MemoryPlan:
    """The same of struct actqkv_params *."""
    memory = ffi.new("struct actqkv_memory *")
    call(lib.actqkv_memory_plan, model_pointer(model), params, memory)
    plan: MemoryPlan = _plain(memory, MemoryPlan)
    return plan


def row_bytes(kv_type: str, n: int) -> int:
    """Bytes of a row of `n` numbers as keys and values of `kv_type` are kept."""
    return int(lib.actqkv_row_bytes(KV_TYPES[kv_type], n))


def try_extra_buffers() -> None:
    """Multiply small matrices in the CPU's extra buffer types; may kill the process: see machine.py."""
    call(lib.actqkv_try_extra_buffers)


def kernel_name() -> str:
    """Instruction set that the kernels dispatch to on this machine."""
    return _text(lib.actqkv_kernel_name())


def has_threads() -> bool:
    """Whether the kernels were built to run on several threads."""
    return bool(lib.actqkv_has_threads())


# ---- callbacks: one pair of C functions; the session in the call says whose Python callable is meant

_calling = threading.local()  # .session: the Session whose native call runs on this thread


def _keep_exception(kind: type[BaseException], value: BaseException, traceback: Any) -> None:
    """What a callback raised waits in its session and is raised when the native call returns."""
    session: Session = _calling.session
    if session._raised is None:
        session._raised = value


@ffi.def_extern(onerror=_keep_exception, error=False)  # type: ignore[untyped-decorator]
def actqkv_py_progress(user: Any, n_done: int, n_total: int) -> bool:
    session: Session = _calling.session
    if session._raised is not None:  # from the observer, which cannot stop the call itself
        return False
    return session.progress is None or session.progress(n_done, n_total) is not False


@ffi.def_extern(onerror=_keep_exception)  # type: ignore[untyped-decorator]
def actqkv_py_observe(  # noqa: PLR0917 (as in callbacks.cdef)
    user: Any, name: Any, layer: int, n_past: int, data: Any, ne: Any
) -> None:
    session: Session = _calling.session
    if session._raised is None and session.observer is not None:
        text = _text(name)
        shape = tuple(ne[i] for i in range(_OBSERVED_DIMS.get(text, 1)))[::-1]
        flat = np.frombuffer(ffi.buffer(data, 4 * int(np.prod(shape))), dtype=np.float32)
        session.observer(text, layer, n_past, flat.reshape(shape).copy())


def _copied(pointer: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any] | None:
    """A C array as an array of its own; None for NULL."""
    if pointer == ffi.NULL:
        return None
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    copy: NDArray[Any] = np.frombuffer(ffi.buffer(pointer, n_bytes), dtype=dtype).reshape(shape).copy()
    return copy


@ffi.def_extern(onerror=_keep_exception)  # type: ignore[untyped-decorator]
def actqkv_py_record(user: Any, found: Any) -> None:
    session: Session = _calling.session
    if session._raised is None and session._recorder is not None:
        mass = _copied(found.mass, (found.n_lists, found.n_chunks), np.float64)
        chosen = _copied(found.chosen, (found.n_lists, found.n_chosen), np.int32)
        if chosen is None and found.n_chosen < found.n_chunks:
            chosen = np.empty((found.n_lists, 0), np.int32)
        session._recorder(
            Record(
                n_past=found.n_past,
                n_tokens=found.n_tokens,
                phase=_PHASE_NAMES[found.phase],
                layer=found.layer,
                n_chunks=found.n_chunks,
                n_chosen=found.n_chosen,
                chosen=chosen,
                bias=_copied(found.bias, (found.n_tokens,), np.float32),
                weights=_copied(found.weights, (found.n_tokens,), np.float32),
                mass=None if mass is None else mass.astype(np.float32),
                entropy=found.entropy,
            )
        )


def token_array(tokens: Any) -> NDArray[np.int32]:
    """Tokens as the library takes them; ParameterError instead of a number that wraps or loses its fraction."""
    given = np.asarray(tokens)
    array = np.ascontiguousarray(given, dtype=np.int32)
    if given.size and not np.array_equal(given, array):
        raise ParameterError(f"tokens are whole numbers of 32 bits, not {given[given != array][0]}")
    return array


# ---- session


class Session:
    """One history of tokens over a loaded model. A context manager; `close()` may be called twice.

    Args:
        model: a llama_cpp LlamaModel (`llm._model`); kept alive, and closes this session before it frees itself.
        retrieval: what is attended, and how it is chosen.
        n_ctx: tokens the session can hold.
        n_threads: of the computation, at least 1.
        kv_type: of closed chunks, a key of KV_TYPES.

    Attributes:
        progress: called after each window with (tokens done, tokens asked for in this call); returning False, or
            raising, stops the call. None: off.
        observer: called with (name, layer, n_past, float32 array, slowest dimension first) for the arrays that
            actqkv.h lists under actqkv_observe_fn. None: off.

    Raises:
        ModelError, ParameterError, MemoryPlanError: as the library says; nothing is left allocated.
        ThreadError: from any method, when another thread is in a call of this session.
        StateError: from any method, when the session is closed.

    Example:
        >>> with Session(llm._model, Retrieval(), n_ctx=4096, n_threads=2) as session:
        ...     logits = session.decode(np.array([1, 450, 338], np.int32), n_logits=1)   # [1, n_vocab]
    """

    progress: ProgressFn | None

    def __init__(self, model: Any, retrieval: Retrieval, *, n_ctx: int, n_threads: int, kv_type: str = "f16") -> None:
        params = make_params(retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type)
        self._begin(model, params, lambda *out: call(lib.actqkv_session_new, model_pointer(model), params, *out))

    def _begin(self, model: Any, params: Any, make: Callable[..., None]) -> None:
        """make: the library's call that leaves the new session in the pointer given."""
        self._handle: Any = None
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._raised: BaseException | None = None
        self._observer: ObserverFn | None = None
        self._recorder: RecordFn | None = None
        self.progress = None
        self.model = model
        self.n_vocab: int = model.n_vocab()
        self.plan = native_plan(model, params)
        out = ffi.new("actqkv_session **")
        make(out)
        self.n_layer: int = llama_cpp.llama_model_n_layer(model.model)
        self._handle = ffi.gc(out[0], lib.actqkv_session_free, size=min(self.plan.total_bytes, 2**62))
        lib.actqkv_set_progress(self._handle, lib.actqkv_py_progress, ffi.NULL)
        lifetime.guard_of(model).sessions.add(self)

    # -- life

    def close(self) -> None:
        """Free the native session. Other methods raise StateError from now on. ThreadError: a thread is in a call."""
        lifetime.close_all([self])

    def _free(self) -> None:
        """For whoever has the session to itself."""
        ffi.release(self._handle)
        self._handle = None

    @property
    def closed(self) -> bool:
        return self._handle is None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[Any]:
        """The handle, for this thread alone; what a callback raised meanwhile is raised at the end."""
        me = threading.current_thread()
        if not self._lock.acquire(blocking=False):
            owner = self._owner
            raise ThreadError(
                f"thread {me.name!r} entered a session that thread {owner.name if owner else '?'!r} is using",
                "use a session from one thread at a time: add a lock, or make a Llama per thread",
            )
        outer = getattr(_calling, "session", None)
        try:
            self._owner, self._raised = me, None
            _calling.session = self
            if self._handle is None:
                raise StateError("the session is closed")
            yield self._handle
        finally:
            _calling.session = outer
            self._owner = None
            raised, self._raised = self._raised, None
            self._lock.release()
            if raised is not None:
                raise raised

    def _handle_to_read(self) -> Any:
        """The handle for a getter: also from a callback of this session's own call."""
        owner = self._owner
        if owner is not None and owner is not threading.current_thread():
            raise ThreadError(
                f"thread {threading.current_thread().name!r} read a session that thread {owner.name!r} is using",
                "use a session from one thread at a time: add a lock, or make a Llama per thread",
            )
        if self._handle is None:
            raise StateError("the session is closed")
        return self._handle

    # -- what it holds

    @property
    def n_past(self) -> int:
        """Tokens in the history."""
        return int(lib.actqkv_n_past(self._handle_to_read()))

    @property
    def n_chunks(self) -> int:
        """Chunks that can be retrieved now."""
        return int(lib.actqkv_n_chunks(self._handle_to_read()))

    @property
    def params(self) -> Params:
        """The parameters of reading; positions resolved from "auto"."""
        return found_params(lib.actqkv_session_params(self._handle_to_read()))

    @property
    def answering(self) -> Params:
        """The parameters of answering: `params`, or what `set_answering` put in their place."""
        return found_params(lib.actqkv_session_answering(self._handle_to_read()))

    def set_answering(self, retrieval: Retrieval) -> None:
        """Answer by another method or budget over the same stores from now on; reading stays as it was.

        Raises:
            ParameterError: the stores would differ; the message names every column that does. Nothing changes.
        """
        found = self.params
        params = make_params(retrieval, n_ctx=found.n_ctx, n_threads=found.n_threads, kv_type=found.kv_type)
        for name in _SIZES.values():
            wanted, here = getattr(params, name), getattr(found, name)
            if name != "budget" and wanted != here:
                raise ParameterError(f"{name} is {wanted}, the reading's {here}", "answer with the reading's sizes")
        with self._exclusive() as handle:
            call(lib.actqkv_set_answering, handle, ffi.addressof(params, "method"), params.budget)

    def history(self) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """All tokens [n_past] and the phase each entered in [n_past] (0 prefill, 1 decode, 2 question)."""
        with self._exclusive() as handle:
            n = lib.actqkv_n_past(handle)
            tokens, phases = np.empty(n, np.int32), np.empty(n, np.int8)
            into = ffi.from_buffer("int32_t[]", tokens), ffi.from_buffer("int8_t[]", phases)
            call(lib.actqkv_history, handle, 0, n, *into)
        return tokens, phases

    # -- reading and writing

    def decode(self, tokens: Any, *, phase: Phase = "prefill", n_logits: int = 0) -> NDArray[np.float32]:
        """Append tokens (int array [n]) and return the logits [n_logits, n_vocab] of the last n_logits of them.

        Raises:
            ContextError: they do not fit n_ctx; the history is unchanged.
            Cancelled, or what the progress callback or observer raised, KeyboardInterrupt included: completed windows
                are kept, `n_past` says how many tokens.
            ParameterError: a token outside the vocabulary, or n_logits outside 0 .. n.
        """
        array = token_array(tokens)
        logits = np.empty((max(n_logits, 0), self.n_vocab), np.float32)
        rows = ffi.from_buffer("float[]", logits) if n_logits > 0 else ffi.NULL
        with self._exclusive() as handle:
            call(
                lib.actqkv_decode,
                handle,
                ffi.from_buffer("int32_t[]", array),
                array.size,
                _PHASES[phase],
                rows,
                n_logits,
            )
        return logits

    def rewind(self, n_past: int) -> None:
        """Forget all tokens from `n_past` on; the next decode equals a fresh run over what remains."""
        with self._exclusive() as handle:
            call(lib.actqkv_rewind, handle, n_past)

    def checkpoint(self) -> None:
        """Keep a checkpoint here, so that a rewind to this point reads nothing again."""
        with self._exclusive() as handle:
            call(lib.actqkv_checkpoint, handle)

    def repeat(self, n_tokens: int) -> None:
        """Make the history `n_tokens` long by copies of its chunks: for measurements, its answers then mean nothing."""
        with self._exclusive() as handle:
            call(lib.actqkv_repeat, handle, n_tokens)

    def state_get(self) -> bytearray:
        """All of the session as one self-contained blob."""
        with self._exclusive() as handle:
            blob = bytearray(lib.actqkv_state_size(handle))
            call(lib.actqkv_state_get, handle, ffi.from_buffer("uint8_t[]", blob), len(blob))
        return blob

    def state_set(self, blob: bytes | bytearray | memoryview) -> None:
        """Replace the session's history by that of `blob` (bytes-like, of `state_get`).

        Raises:
            StateError: the blob is damaged, or of another model or parameters; the history is unchanged.
        """
        data = ffi.from_buffer("uint8_t[]", blob)
        with self._exclusive() as handle:
            call(lib.actqkv_state_set, handle, data, len(data))

    # -- on a GPU

    def use_gpu(self, table: Any, device: int, limit_bytes: int) -> None:
        """Attend on a GPU from now on; where that fails, and where it fails later, the session goes on without.

        Args:
            table: of `_cuda.load`; limit_bytes: the most that is taken of the memory of GPU number `device`.

        Raises:
            MemoryPlanError: the limit is too small, or the GPU has less; says what is needed.
            ComputeError: CUDA does not start there.
        """
        with self._exclusive() as handle:
            call(lib.actqkv_use_gpu, handle, table, device, limit_bytes)

    @property
    def gpu_problem(self) -> str | None:
        """What did not go as planned on the GPU; None: nothing."""
        return _text(lib.actqkv_gpu_problem(self._handle_to_read())) or None

    # -- what was attended

    def sources_begin(self) -> None:
        """From now on sum the squared attention weights that answered tokens give to each token of the past."""
        with self._exclusive() as handle:
            lib.actqkv_sources_begin(handle)

    def sources_end(self) -> NDArray[np.float64]:
        """The sums [n] of the history's first n tokens, averaged over heads and layers; and stop. Empty: no answer."""
        with self._exclusive() as handle:
            weights = np.zeros(lib.actqkv_n_past(handle))
            n = lib.actqkv_sources_end(handle, ffi.from_buffer("double[]", weights), weights.size)
        return weights[: int(n)]

    def stats(self) -> Stats:
        """Time and traffic since the last reset."""
        found: Stats = _plain(lib.actqkv_stats_get(self._handle_to_read()), Stats)
        return found

    def stats_reset(self) -> None:
        with self._exclusive() as handle:
            lib.actqkv_stats_reset(handle)

    @property
    def observer(self) -> ObserverFn | None:
        return self._observer

    @observer.setter
    def observer(self, function: ObserverFn | None) -> None:
        with self._exclusive() as handle:
            self._observer = function
            callback = ffi.NULL if function is None else lib.actqkv_py_observe
            lib.actqkv_set_observer(handle, callback, ffi.NULL)

    def set_recorder(self, function: RecordFn | None, *, mass: Mass = "none") -> None:
        """Call `function` with a Record of every window and layer from now on; None: off.

        Args:
            mass: of which windows the true attention mass is measured: "none", "answers" or "all". Each of them attends
                everything once more in every layer.
        """
        with self._exclusive() as handle:
            callback = ffi.NULL if function is None else lib.actqkv_py_record
            call(lib.actqkv_set_recorder, handle, callback, ffi.NULL, getattr(lib, f"ACTQKV_MASS_{mass.upper()}"))
            self._recorder = function

    def set_audit(self, every: int) -> None:
        """Measure the recall of one KV head of one layer every `every`-th answered token; 0: off. `stats` has it."""
        with self._exclusive() as handle:
            call(lib.actqkv_set_audit, handle, every)
