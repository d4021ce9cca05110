"""`Llama`: llama_cpp.Llama with its context replaced by an actqkv session.

The base class is constructed over a context of the smallest size; then `_ctx` becomes a SessionContext, `scores` the
rows that were asked for, and eval, sample and the state methods are ours. Samplers, grammars, chat formats and the
completion loop stay the base's. tests/api/test_base_uses.py walks the base's source for uses of `_ctx` not covered.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar
from numpy.typing import NDArray

from actqkv_cpp import compat, default_model_path, guards, machine, modelfile, saved
from actqkv_cpp._native import KV_TYPES, Session, memory_plan, model_check
from actqkv_cpp.auditing import Auditor
from actqkv_cpp.chat import Chat
from actqkv_cpp.config import LLAMA_CPP, Retrieval, check_retrieval, parse_size
from actqkv_cpp.context import Closed, SessionContext
from actqkv_cpp.document import Document, PathLike, Progress, text_files
from actqkv_cpp.errors import (
    Cancelled,
    ContextError,
    GpuMemoryError,
    ModelError,
    ParameterError,
    StateError,
    unknown_name,
)
from actqkv_cpp.figures import Mass, Phase
from actqkv_cpp.gpu import GpuUse, Layers, NoGpu
from actqkv_cpp.lifetime import guard_of
from actqkv_cpp.placement import Placement
from actqkv_cpp.reader import TextFile
from actqkv_cpp.recording import Recording
from actqkv_cpp.rows import LogitRows
from actqkv_cpp.template import ChatTemplate, Encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SMALLEST_N_CTX = 1  # of the base's own context, which only serves low-level calls on .ctx
_BASE_CONTEXT_ERROR = re.compile(r"Requested tokens \((\d+)\) exceed context window of \d+")


class Llama(llama_cpp.Llama):
    """A drop-in for llama_cpp.Llama whose KV memory is an actqkv session: long documents at the cost of short ones.

    Args:
        model_path: a GGUF file (the first of a split model). None: the bundled model, for trying out.
        retrieval: what is attended and how it is chosen; default Retrieval().
        kv_type: type in which chunks are kept once they have left local: "f16", "q8_0" or "q4_0".
        kv_file: KV file that `read` writes while it reads, or goes on with where it holds the beginning; and where keys
            and values stay, so that the plan counts on disk instead of memory for them. Also of a file to `open`.
        vram: bytes of GPU `main_gpu` that attention may take beside weights, "6g" or a number; None: what is of use, as
            far as it is free; 0: attention stays on the processor.
        **options: the constructor arguments of llama_cpp.Llama; docs/llama_cpp.md says what becomes of each. `n_ctx`
            (tokens, default 512 as there, 0: the trained length) also takes "128k" and may exceed the trained length.

    Attributes:
        engine: "actqkv", or "llama.cpp" where an option or the model needs a dense context (a warning says so).
        engine_reason: why it is "llama.cpp"; None otherwise.
        session: the native session; None on llama.cpp.
        gpu: the GpuUse that attention runs with, or a NoGpu with the reason why it runs on the processor.
        gpu_layers: how many layers of the model are on GPUs, and why not all or none.
        retrieval: the Retrieval given.
        document: the latest reading, also an interrupted one; None before the first.

    Threads: one at a time; a second thread that enters gets ThreadError. Ctrl-C in a long reading raises
    KeyboardInterrupt at the end of a window and keeps the windows before it.

    Raises:
        ModelError: the file is missing, broken or not a GGUF model.
        ParameterError: an unknown option (with the nearest known one), or values that contradict each other.
        MemoryPlanError: n_ctx tokens do not fit in memory; GpuMemoryError: `vram` is too little, or it or the
            layers asked for do not fit in a GPU.

    Example:
        >>> llm = Llama("model.gguf", n_ctx="128k")
        >>> llm.read("book.txt", progress=print).ask("Who kept the key?").text
    """

    engine: Literal["actqkv", "llama.cpp"]
    engine_reason: str | None
    session: Session | None
    retrieval: Retrieval
    document: Document | None
    _CLOSED = Closed()

    def __init__(
        self,
        model_path: PathLike | None = None,
        *,
        retrieval: Retrieval | None = None,
        kv_type: str = "f16",
        kv_file: PathLike | None = None,
        vram: int | str | None = None,
        **options: Unpack[compat.LlamaOptions],
    ) -> None:
        given = cast(dict[str, Any], options)
        compat.check_names(given)
        self._retrieval = retrieval
        self.retrieval = self._answering = check_retrieval(retrieval if retrieval is not None else Retrieval())
        self.kv_file = None if kv_file is None else Path(kv_file)
        spread = given.get("split_mode", llama_cpp.LLAMA_SPLIT_MODE_LAYER) != llama_cpp.LLAMA_SPLIT_MODE_NONE
        self._placement = Placement(vram, int(given.get("main_gpu", 0)), spread=spread)
        self.session = self.document = None
        self.kv_type = compat.kv_type(kv_type, given, KV_TYPES)
        self._asked_format = given.get("chat_format")  # the base puts what it guesses in .chat_format
        self._auditor: Auditor | None = None
        self._has_opened = False  # the session is of a KV file, by the method of its reading
        self._prompting = False  # generate() is about to read its prompt
        self._sampled: int | None = None  # what sample() returned, until it is read back: that is a decode step
        given["n_ctx"] = parse_size(given.get("n_ctx", compat.base_defaults()["n_ctx"]))
        path = modelfile.check(
            model_path if model_path is not None else default_model_path(), given.get("kv_overrides")
        )
        if given.get("lora_path") is not None:
            modelfile.check_adapter(given["lora_path"], path)
        if given.get("n_batch", 1) < 1:
            raise ParameterError(f"n_batch is {given['n_batch']}, expected 1 or more")
        wanted = given.get("n_gpu_layers", 0)
        self.gpu_layers = Layers(0, 0) if given.get("vocab_only") else self._placement.layers(path, wanted)
        self._layers_chosen = wanted is None  # by us, so that fewer will do

        asked = "vocab_only" if given.get("vocab_only") else LLAMA_CPP if self.retrieval.method == LLAMA_CPP else None
        reason = asked or compat.dense_reason(given)
        if reason is None:
            own = {"n_ctx": _SMALLEST_N_CTX, "logits_all": False, "type_k": None, "type_v": None}
            self._load(path, given | own)
            try:
                model_check(self._model)
            except ModelError as error:
                reason = str(error)
                self._stack.close()
        self.engine, self.engine_reason = ("actqkv" if reason is None else "llama.cpp"), reason
        if reason is None:
            try:
                self._attach(given)
            except BaseException:
                self.close()
                raise
            return
        if asked is None:
            warnings.warn(f"running densely through llama.cpp: {reason}", stacklevel=2)
        if asked != "vocab_only":
            kv = None if self.kv_type == "f16" else KV_TYPES[self.kv_type]
            given = {"type_k": kv, "type_v": kv} | given
        self._load(path, given)

    # -- construction

    @property
    def model_params(self) -> Any:
        """llama_model_params of the base. The setter clears `use_extra_bufts` where extra buffer types crash."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = machine.extra_buffers().safe
        self._model_params = params

    def _load(self, path: str, options: dict[str, Any]) -> None:
        """The base's constructor; what libllama logged becomes the message when it fails. Where another process took
        the GPU's memory in between, fewer layers go there, unless their number was asked for.
        """
        while True:
            if self._layers_chosen or self.gpu_layers.n:
                options = options | {"n_gpu_layers": self.gpu_layers.n}
            with modelfile.logged_errors() as log:
                try:
                    super().__init__(path, **options)
                    break
                except ValueError as error:
                    self.close()
                    detail = next((line for line in log if line), str(error))
                    short = modelfile.short_of_gpu_memory(log) if self.gpu_layers.n else None
                    if short is None:
                        hint = "check that the file is complete and is a GGUF model"
                        raise ModelError(f"{path}: {detail}", hint) from error
                    if not self._layers_chosen:
                        raise GpuMemoryError(
                            f"{self.gpu_layers.n} layers of {path} do not fit in the GPU's memory: {short}",
                            "give a smaller n_gpu_layers, 0 for the processor, or end what else uses the GPU "
                            "(nvidia-smi shows it)",
                        ) from error
            self.gpu_layers = self._placement.fewer(path, self.gpu_layers, short)
        guard = guard_of(self._model)
        guard.watch(self._model, "tokenize")
        guard.watch(self._ctx, "decode")

    def _attach(self, options: dict[str, Any]) -> None:
        """Put a session in place of the context that the base made."""
        n_ctx = options["n_ctx"] or self._model.n_ctx_train()
        n_threads = options.get("n_threads") or options.get("n_threads_batch") or machine.available_cores()
        plan = memory_plan(self._model, self.retrieval, n_ctx=n_ctx, n_threads=n_threads, kv_type=self.kv_type)
        machine.check_memory(plan, n_ctx, n_in_file=n_ctx if self.kv_file is not None else 0)
        sizes: Any = {"n_ctx": n_ctx, "n_threads": n_threads, "kv_type": self.kv_type}
        self._placement.plan(self._model, self.retrieval, **sizes)
        self.session = Session(self._model, self.retrieval, **sizes)
        self._placement.enter(self.session)
        self._ctx = cast(Any, SessionContext(self.session, self._ctx))
        self._n_ctx = n_ctx
        self.n_batch = min(n_ctx, options.get("n_batch", compat.base_defaults()["n_batch"]))
        self.n_threads = self.n_threads_batch = n_threads
        for name in ("n_ctx", "n_batch", "n_threads"):
            setattr(self.context_params, name, getattr(self, f"_{name}" if name == "n_ctx" else name))
        self.input_ids = np.zeros(n_ctx, np.intc)
        self._logits_all = bool(options.get("logits_all", False))
        self._take_history(self.session)

    def _take_session(self, session: Session) -> None:
        """Put another session over the same model, and its history, in the place of this one."""
        if self.session is not None:
            self.session.close()
        self.session = session
        self._placement.enter(session)
        self._ctx = cast(Any, SessionContext(session, cast(SessionContext, self._ctx)._own))
        self._take_history(session)
        if self._auditor is not None:
            self._auditor.follow(session)

    def _take_history(self, session: Session) -> None:
        tokens, _ = session.history()
        self.n_tokens = len(tokens)
        self.input_ids[: self.n_tokens] = tokens
        self._rows = LogitRows(self._n_vocab, n_tokens=self.n_tokens, keep_all=self._logits_all)
        self.scores = cast(Any, self._rows)
        self._requires_eval, self._sampled = True, None

    @property
    def gpu(self) -> GpuUse | NoGpu:
        """Where attention runs, or why it does not run on a GPU (any more)."""
        return self._placement.found(self.session)

    def close(self) -> None:
        """Free session and model. May be called twice; any other use raises StateError from then on.

        Raises:
            ThreadError: another thread reads or answers; nothing is freed, and the other thread goes on.
        """
        stack, model = getattr(self, "_stack", None), getattr(self, "_model", None)
        if stack is None or model is self._CLOSED:
            return
        if model is not None:
            guard_of(model).close(self.session)
        stack.close()
        for name in ("_model", "_ctx", "tokenizer_", "_encoder", "_template"):
            setattr(self, name, self._CLOSED)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self.session is not None:
            state |= {"type_k": None, "type_v": None}
        own = {"kv_type": self.kv_type, "kv_file": self.kv_file, "vram": self._placement.vram}
        own |= {"chat_format": self._asked_format}
        return state | {"retrieval": self._retrieval} | own

    @property
    def n_ctx_train(self) -> int:
        """Tokens the model was trained on: exact positions end there. 0 where the file does not say."""
        arch = self.metadata.get("general.architecture")  # libllama itself knows nothing with vocab_only
        return int(self._model.n_ctx_train() or self.metadata.get(f"{arch}.context_length", 0))

    # -- evaluating

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens into the history, after its first `n_tokens`.

        A token that sample() just returned enters as a decode step, and so does the last token of generate()'s prompt;
        all others are prefill. Their results differ, and both equal a fresh run over the same history.

        Raises:
            ContextError: they do not fit n_ctx; nothing was read.
            KeyboardInterrupt, Cancelled: `n_tokens` says what was read.
        """
        if self.session is None:
            self._require_context()
            super().eval(tokens)
            return
        sampled, self._sampled = self._sampled, None
        array = np.asarray(tokens, np.int32)
        n_decode = 1 if array.size and sampled is not None and int(array[0]) == sampled else 0
        self._feed(array[:n_decode], phase="decode")
        prompting, self._prompting = self._prompting, False
        (self._feed_prompt if prompting else self._feed)(array[n_decode:])

    def _feed_prompt(self, tokens: NDArray[np.int32], *, sources: bool = False) -> None:
        """Append a prompt [n] that is to be answered. Its last token is a decode step: the first token of the answer
        then comes from a plan made for it alone, not for the average of the question's tokens.

        Args:
            sources: the session begins to watch what is attended with that step.
        """
        self._feed(tokens[:-1])
        if sources and self.session is not None:
            self.session.sources_begin()
        self._feed(tokens[-1:], phase="decode")

    def _feed(self, tokens: NDArray[np.int32], *, phase: Phase = "prefill", progress: Progress | None = None) -> None:
        """Append tokens [n] to the history in one phase, on either engine."""
        if not len(tokens):
            return
        n_past, n = self.n_tokens, len(tokens)
        if n_past + n > self._n_ctx:
            raise ContextError(
                f"Requested tokens ({n_past + n}) exceed context window of {self._n_ctx}",
                "make the Llama with a larger n_ctx, or reset() it",
            )
        if self.session is None:
            self._feed_dense(tokens, progress)
            return
        self._rewind(n_past)
        self.input_ids[n_past : n_past + n] = tokens
        self._requires_eval = True
        self.session.progress = progress
        try:
            rows = self.session.decode(tokens, phase=phase, n_logits=n if self._logits_all else 1)
            self._rows.put(n_past + n - len(rows), rows)
            self._requires_eval = False
            if self._auditor is not None and phase == "decode":
                self._auditor.look()
        finally:
            self.session.progress = None
            self.n_tokens = self.session.n_past
            self._rows.truncate(self.n_tokens)

    def _feed_dense(self, tokens: NDArray[np.int32], progress: Progress | None) -> None:
        self._require_context()
        n = len(tokens)
        for begin in range(0, n, self.n_batch):
            super().eval(tokens[begin : begin + self.n_batch].tolist())
            if progress is not None and progress(min(begin + self.n_batch, n), n) is False:
                raise Cancelled("the progress callback stopped the reading")

    def _enter(self) -> None:
        """ThreadError or StateError before anything changes, when another thread is in the session or it is closed."""
        if self.session is not None:
            _ = self.session.n_past

    def _require_context(self) -> None:
        if self.engine_reason == "vocab_only":
            raise StateError("a Llama with vocab_only=True only tokenises", "load it without vocab_only")

    def _rewind(self, n_past: int) -> None:
        """Forget tokens from `n_past` on, on either engine. Of a model that cannot go back (recurrent ones, which run
        through llama.cpp), those before are read again."""
        if self.session is not None:
            if n_past > self.session.n_past:
                raise StateError(f"n_tokens is {n_past}, the session holds {self.session.n_past}")
            if n_past < self.session.n_past:
                self.session.rewind(n_past)
                self._requires_eval = True
            self._rows.truncate(n_past)
        elif n_past < self.n_tokens and not self._ctx.kv_cache_seq_rm(-1, n_past, -1):
            before = self.input_ids[:n_past].tolist()
            self.reset()
            super().eval(before)
        self.n_tokens = n_past

    @property
    def _scores(self) -> NDArray[np.float32]:
        """Rows up to the last token, for the base: all of them wherever it asks for one by its number."""
        if self.session is None:
            return super()._scores
        self._rows.truncate(self.n_tokens)
        return self._rows.kept()

    @property
    def eval_logits(self) -> deque[list[float]]:
        if self.session is None:
            return super().eval_logits
        return deque(self._scores.tolist(), maxlen=self._n_ctx if self._logits_all else 1)

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        if self.session is None:
            self._require_context()
            return cast(int, super().sample(*args, **kwargs, idx=idx))  # type: ignore[misc]
        self._rows.truncate(self.n_tokens)
        try:
            row = self._rows[-1 if idx is None else idx]
        except IndexError:
            raise StateError("there are no logits to sample from", "eval() some tokens first") from None
        sampler = self._sampler if self._sampler is not None else self._init_sampler(*args, **kwargs)
        candidates = self._candidates
        candidates.copy_logits(row)
        candidates.candidates.selected = -1
        llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(candidates.candidates))
        selected = candidates.candidates.selected
        if not 0 <= selected < candidates.candidates.size:
            raise StateError("the samplers selected no token", "end a custom sampler chain with a selecting sampler")
        chosen = candidates.candidates.data[selected]
        if np.isneginf(chosen.logit):  # a grammar aborts when it is told of a token that it forbids
            raise StateError("no token of the model may follow here", "loosen the grammar, or the bias of tokens")
        token = int(chosen.id)
        llama_cpp.llama_sampler_accept(sampler.sampler, token)
        self._sampled = token
        return token

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, LlamaGrammar):
                guards.check_grammar(self._model, given)
        return super()._init_sampler(*args, **kwargs)

    def detokenize(self, tokens: list[int], *args: Any, **kwargs: Any) -> bytes:
        guards.check_tokens(tokens, self._n_vocab)
        return super().detokenize(tokens, *args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        self._enter()
        self._sampled = None  # a prompt is prefill, also one that begins with the token sampled last
        self._prompting = True
        try:
            yield from super().generate(tokens, *args, **kwargs)
        finally:
            self._prompting = False  # also where it ended before the prompt was read

    def reset(self) -> None:
        """Start a new history; memory of the old one is reused when the next tokens agree with it."""
        self._sampled = None
        super().reset()  # type: ignore[no-untyped-call]
        if self.session is not None:
            self._rows.truncate(0)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._enter()
        looks_at_rows = self._logits_all and kwargs.get("logprobs") is not None
        if self.session is not None and looks_at_rows and len(self._rows.kept()) < self.n_tokens:
            self.n_tokens = 0  # the base takes the rows of a reused prefix too
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            found = _BASE_CONTEXT_ERROR.fullmatch(str(error))
            if self.session is None or found is None:
                raise
            raise ContextError(
                f"Requested tokens ({found[1]}) exceed context window of {self._n_ctx}",
                "make the Llama with a larger n_ctx, or shorten the prompt",
            ) from error

    # -- state

    def save_state(self) -> llama_cpp.LlamaState:
        """The whole history, for `load_state` of a Llama of the same model and parameters."""
        if self.session is None:
            return super().save_state()
        self._rewind(self.n_tokens)
        blob = bytes(self.session.state_get())
        return llama_cpp.LlamaState(
            scores=self._rows.kept().copy(),
            input_ids=self.input_ids.copy(),
            n_tokens=self.n_tokens,
            llama_state=blob,
            llama_state_size=len(blob),
            seed=self._seed,
        )

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continue where `save_state` was called.

        Raises:
            StateError: the state is of another model, of other parameters, or damaged.
        """
        if self.session is None:
            super().load_state(state)
            return
        self.session.state_set(state.llama_state)
        self._take_history(self.session)
        rows = np.asarray(state.scores)
        self._rows.put(self.n_tokens - len(rows), rows.copy())
        self._seed = state.seed

    # -- methods

    def _native_session(self, what: str) -> Session:
        if self.session is None:
            raise ParameterError(f"{what}: this model runs densely through llama.cpp, which has no methods")
        return self.session

    @contextmanager
    def answering(self, retrieval: Retrieval | None) -> Iterator[None]:
        """Answer by another method or budget within the block, over what was read; None changes nothing.

        Args:
            retrieval: a method whose reading would be the same: chunk, positions, prefill rule and summaries.

        Raises:
            ParameterError: the reading would differ; the message names what does. Also where llama.cpp runs the model.

        Example:
            >>> with llm.answering(Retrieval("actqkv", budget="4k")):
            ...     document.ask("Who kept the key?")
        """
        if retrieval is None:
            yield
            return
        session, before = self._native_session("another method"), self._answering
        session.set_answering(check_retrieval(retrieval))
        self._answering = retrieval
        try:
            yield
        finally:
            self._answering = before
            if not session.closed:
                session.set_answering(before)

    def _widen(self, budget: int) -> None:
        """Answer at `budget` from now on, by the method that is in force."""
        wider = dataclasses.replace(self._answering, budget=budget)
        self._native_session("a budget").set_answering(wider)
        self._answering = wider

    @contextmanager
    def record(self, *, mass: Mass = "none") -> Iterator[Recording]:
        """Record what every layer does in every window within the block: bias, chosen chunks, shares, entropies.

        Args:
            mass: measure the true attention mass too, and with it recalls, in windows of "answers" or "all". Each of
                them then attends everything once more in every layer.

        Raises:
            ParameterError: an unknown `mass`, or llama.cpp runs the model.

        Example:
            >>> with llm.record(mass="answers") as trace:
            ...     document.ask("Who kept the key?")
            >>> trace.mass_recall()  # per layer
        """
        if mass not in get_args(Mass):
            raise unknown_name("value for mass", str(mass), get_args(Mass))
        session = self._native_session("recording")
        params = session.params
        recording = Recording(params.n_sink, params.n_chunk_tokens, session.n_layer)
        session.set_recorder(recording.add, mass=mass)
        try:
            yield recording
        finally:
            if not session.closed:
                session.set_recorder(None)

    def audit(self, every: int, *, min_recall: float | None = None, max_budget: int | str | None = None) -> None:
        """Check retrieval while answering: every `every`-th token, the recall of one KV head of one layer in turn.

        Answers then report it (`Answer.audit`). With `min_recall` the budget of answering doubles whenever the mean of
        the last 8 audits at one budget falls short of it, up to `max_budget`, and stays wide for the session.

        Args:
            every: tokens from audit to audit; 0 switches audits off. One of them costs that KV head's dense attention.
            min_recall: 0 to 1; None: the budget stays.
            max_budget: tokens; default 8 times the budget given.

        Raises:
            ParameterError: a value out of range, or llama.cpp runs the model.

        Example:
            >>> llm.audit(16, min_recall=0.95)
            >>> document.ask("Who kept the key?").audit.recall
        """
        session = self._native_session("audits")
        most = 8 * int(self._answering.budget) if max_budget is None else parse_size(max_budget)
        auditor = Auditor(session, every, min_recall, most, self._widen)
        session.set_audit(every)
        self._auditor = auditor if every > 0 else None

    # -- documents

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self, self._asked_format)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._model)

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes as a document, its template aside.

        Example:
            >>> llm.count_tokens("Marten kept the key.")
            7
        """
        return len(self._encoder.tokenize(text))

    def read(
        self,
        source: PathLike | TextFile | Sequence[PathLike | TextFile] | None = None,
        *,
        text: str | None = None,
        name: str | None = None,
        system: str | None = None,
        question: str | None = None,
        reserve: int | None = None,
        progress: Progress | None = None,
    ) -> Document:
        """Read documents into the session, replacing its history; questions come later, any number of them.

        Args:
            source: a file (PDF, DOCX, EPUB, HTML, Markdown, text, source code), or several, read one after another.
            text: the document itself, instead of `source`.
            name: what `text` is called in sources; default "text".
            system: instructions that stand before the documents.
            question: stands before the documents; with Retrieval(question_weight=...) the reading is guided by it.
            reserve: tokens to keep free for question and answer; default 1024, at most an eighth of n_ctx.
            progress: called with (tokens done, tokens in all) after each window; returning False stops the reading.

        Raises:
            DocumentError: a file is missing, empty, damaged or cannot be read as text; says what to do.
            ContextError: documents, template and reserve exceed n_ctx; refused before anything is read.
            Cancelled, KeyboardInterrupt: what was read is kept; `llm.document` is the partial reading.

        Example:
            >>> doc = llm.read("book.txt", progress=lambda done, total: print(f"{done}/{total}"))
        """
        files = text_files(source, text, name)
        self._require_context()
        if self._has_opened:
            saved.leave_opened(self)
        document = Document(self, files, system=system, question=question, reserve=reserve)
        with saved.written(self, document._reading):
            self.document = document
            document._read(document._reading, progress)
        return document

    def open(self, path: PathLike) -> Document:
        """Open a KV file, of `Document.save`, `kv_file=` or `actqkv index`: what was read is there at once.

        Memory is needed for what is attended, and shared by processes. Answers are by the Retrieval that this Llama was
        given, else by that of the reading. An interrupted reading opens as it is: `Document.resume` reads on.

        Raises:
            KVFileError: the file is missing or cannot be read.
            StateError: it is damaged, no KV file, of another version or of another model.
            ContextError, MemoryPlanError: it does not fit n_ctx; what is needed beside it does not fit in memory.
            ParameterError: this Llama's Retrieval cannot answer from it, or llama.cpp runs the model.

        Warns:
            UserWarning: another quantisation of the model read it, or the document has changed since.

        Example:
            >>> llm.open("book.akv").ask("Who kept the key?").text
        """
        self.document = Document._opened(self, path)
        return self.document

    def chat(
        self,
        document: Document | PathLike | TextFile | Sequence[PathLike | TextFile] | None = None,
        *,
        system: str | None = None,
        progress: Progress | None = None,
    ) -> Chat:
        """Start a conversation: over a Document that was read, over files to be read now, or over nothing.

        Args:
            document: a reading of this Llama, or what `read` takes; None: no documents.
            system: instructions; with a Document they were given to `read`.
            progress: as in `read`.

        Raises:
            as `read`.

        Example:
            >>> chat = llm.chat("book.txt")
            >>> chat.say("Who kept the key?").text
        """
        if document is None:
            return Chat(self, None, system=system)
        if isinstance(document, Document) and system is not None:
            raise ParameterError("a Document has its system text already", "give system= to read()")
        if isinstance(document, Document):
            return Chat(self, document)
        return Chat(self, self.read(document, system=system, progress=progress))


# Signatures and docstrings that callers see are the base's; the constructor's has our arguments before the base's.
cast(Any, Llama.__init__).__signature__ = compat.signature(Llama.__init__)
functools.update_wrapper(Llama.sample, llama_cpp.Llama.sample)
functools.update_wrapper(Llama._init_sampler, llama_cpp.Llama._init_sampler)
functools.update_wrapper(Llama.detokenize, llama_cpp.Llama.detokenize)
functools.update_wrapper(Llama.generate, llama_cpp.Llama.generate)
