"""A model under one method after another: which method can run where, and a Llama that does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import actqkv_cpp
from actqkv_cpp import Llama, machine
from actqkv_cpp._native import KV_TYPES, memory_plan
from actqkv_cpp.config import LLAMA_CPP, Retrieval, parse_columns
from actqkv_cpp.errors import ModelError, ParameterError, unknown_name

_QUESTION_AWARE = "+question"
_KV_TYPE = "kv_type="
_TEMPLATE_KEY = "tokenizer.chat_template"
_WINDOW_TOKENS = 256  # of reading, unless local is shorter


@dataclass(frozen=True, kw_only=True)
class Method:
    """A column of the comparison: a method at a budget.

    Attributes:
        name: as on the command line: a method of ours or "llama.cpp"; columns of its row to change, as in
            "actqkv:chunk=16:refine=4", and of its chunks, as in "actqkv:kv_type=q8_0"; "+question" behind it has the
            question stand before the document too.
        budget: tokens attended; None where all are.
    """

    name: str
    budget: int | None

    @property
    def retrieval(self) -> str:
        """The method's name in the native table."""
        return self.name.removesuffix(_QUESTION_AWARE).partition(":")[0]

    @property
    def columns(self) -> dict[str, Any]:
        """What differs from the method's row.

        Raises:
            ParameterError: as `parse_columns`.
        """
        changes = [change for change in self._changes if not change.startswith(_KV_TYPE)]
        return parse_columns(":".join(changes)) if changes else {}

    @property
    def kv_type(self) -> str | None:
        """The type of its chunks, where it has one of its own.

        Raises:
            ParameterError: an unknown type, or more than one.
        """
        found = [change.removeprefix(_KV_TYPE) for change in self._changes if change.startswith(_KV_TYPE)]
        if len(found) > 1:
            raise ParameterError(f"{self.name!r}: expected kv_type once", "name the method once for each type")
        if found and found[0] not in KV_TYPES:
            raise unknown_name("kv_type", found[0], KV_TYPES)
        return found[0] if found else None

    @property
    def _changes(self) -> list[str]:
        return self.name.removesuffix(_QUESTION_AWARE).split(":")[1:]

    @property
    def question_aware(self) -> bool:
        return self.name.endswith(_QUESTION_AWARE)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What all methods have in common."""

    model: Path
    n_sink: int
    n_local: int
    chunk: int | None
    kv_type: str
    n_threads: int | None


def methods(names: Sequence[str], budgets: Sequence[int]) -> list[Method]:
    """Every name at every budget; once only where all tokens are attended.

    Raises:
        ParameterError: an unknown name, with the nearest known one; a wrong column or value; no names or no budgets.
    """
    table = actqkv_cpp.methods()
    if not names or not budgets:
        raise ParameterError("no method to evaluate", f"name some of {', '.join(table)}, and a budget")
    found: list[Method] = []
    for name in names:
        method = Method(name=name, budget=None)
        if method.retrieval not in table and name != LLAMA_CPP:
            raise unknown_name("method", name, [*table, LLAMA_CPP])
        if method.columns:
            Retrieval(method.retrieval, **method.columns)  # checks the values
        _ = method.kv_type  # likewise
        everything = _columns(method)["decode"] == "all"
        found += [Method(name=name, budget=budget) for budget in ([None] if everything else budgets)]
    return list(dict.fromkeys(found))


def _columns(method: Method) -> dict[str, Any]:
    """Of the native table, with the method's changes; llama.cpp is as dense as ours."""
    row = actqkv_cpp.methods()["dense" if method.name == LLAMA_CPP else method.retrieval]
    return {**row, **method.columns}


_SMALLEST = (Method(name="dense", budget=None), 1)  # what is loaded where any session will do


class Engines:
    """One model, and at any time one Llama of it: for the method and the length last asked for. A context manager.

    Raises:
        ModelError: the file is missing or broken, or has no chat template.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._llm: Llama | None = None
        self._key: tuple[Method, int] | None = None
        self.words = self._load(None, 0)
        self._reasons: dict[tuple[Method, int], str | None] = {}
        self._no_graph: str | None = None  # why our graph lacks the model
        if _TEMPLATE_KEY not in self.words.metadata:
            self.close()
            raise ModelError(
                f"{settings.model.name} has no chat template, so its prompts would be guesses",
                "evaluate an instruction-tuned model whose GGUF carries its template",
            )
        self._no_graph = self.any().engine_reason

    def close(self) -> None:
        self._drop()
        self.words.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_threads(self) -> int:
        """Threads that compute."""
        return int(self.any().n_threads)

    # -- tokens

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return self.words.count_tokens(text)

    def cut(self, text: str, n_tokens: int) -> str:
        """`text` without its middle, so that it has at most `n_tokens`: half of them from each end."""
        tokens = self.words._encoder.tokenize(text).tolist()
        if len(tokens) <= n_tokens:
            return text
        head, tail = tokens[: n_tokens // 2], tokens[len(tokens) - (n_tokens - n_tokens // 2) :]
        parts = (b"".join(map(self.words._encoder.piece, part)).decode("utf-8", "ignore") for part in (head, tail))
        return "".join(parts)

    def n_template_tokens(self) -> int:
        """Tokens that the chat template puts around a document and a question."""
        pieces = self.words._template.first(system=True)
        return len(
            self.words.tokenize("".join(piece or "\n\n" for piece in pieces).encode(), add_bos=False, special=True)
        )

    # -- methods

    def why_not(self, method: Method, n_ctx: int) -> str | None:
        """Why a method gives no figure in a session of `n_ctx` tokens; None where it does.

        Looked into once, with nothing in memory that another session would free.
        """
        if (method, n_ctx) not in self._reasons:
            if self._key != _SMALLEST:
                self._drop()
            self._reasons[method, n_ctx] = self._find_reason(self.any(), method, n_ctx)
        return self._reasons[method, n_ctx]

    def _find_reason(self, llm: Llama, method: Method, n_ctx: int) -> str | None:
        trained = int(llm._model.n_ctx_train())
        exact = _columns(method)["positions"] == "exact"
        if exact and n_ctx > trained:
            return f"exact positions end at the trained length of {trained:,} tokens"
        if method.name == LLAMA_CPP:
            return None
        if self._no_graph is not None:
            return f"our graph lacks this model ({self._no_graph})"
        plan = memory_plan(llm._model, self.retrieval(method), n_ctx=n_ctx, kv_type=self.kv_type(method))
        free = machine.available_memory()
        if free is not None and plan.total_bytes > free:
            return f"{n_ctx:,} tokens need {plan.total_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return None

    def retrieval(self, method: Method) -> Retrieval:
        """The parameters of a method at its budget, sizes as of every other method."""
        settings = self.settings
        row = _columns(method)
        sizes = {"n_sink": settings.n_sink, "n_local": settings.n_local, "chunk": settings.chunk, **method.columns}
        n_chunk = int(sizes["chunk"] or row["chunk"])
        budget = method.budget
        if budget is None:
            budget = sizes["n_sink"] + sizes["n_local"] + n_chunk
        elif row["decode"] == "none":
            # what others retrieve, this one attends in its local window: as many tokens as they
            sizes["n_local"] = budget - sizes["n_sink"] - n_chunk
        window = min(_WINDOW_TOKENS, sizes["n_local"])
        return Retrieval(method=method.retrieval, budget=budget, **{"window": window, **sizes})

    def kv_type(self, method: Method) -> str:
        """The type of a method's chunks."""
        return method.kv_type or self.settings.kv_type

    def reads_alike(self, one: Method, other: Method) -> bool:
        """Whether budget and type let one reading serve both; what else it takes, `Llama.answering` says."""
        if LLAMA_CPP in (one.name, other.name) or other.question_aware or self.kv_type(one) != self.kv_type(other):
            return False
        return one.budget == other.budget or _columns(other)["prefill"] in ("all", "none")

    def use(self, method: Method, n_ctx: int) -> Llama:
        """A Llama for the method with a session of `n_ctx` tokens; the one of the call before is closed, if another.

        Raises:
            ModelError, ParameterError, MemoryPlanError: as `Llama`.
        """
        if self._llm is None or self._key != (method, n_ctx):
            self._drop()
            self._llm = self._load(method, n_ctx)
            self._key = (method, n_ctx)
        return self._llm

    def any(self) -> Llama:
        """Some Llama with a loaded model: what is at hand."""
        if self._llm is None:
            self._llm, self._key = self._load(*_SMALLEST), _SMALLEST
        return self._llm

    def _load(self, method: Method | None, n_ctx: int) -> Llama:
        """A new Llama; without a method one that has the vocabulary only."""
        settings = self.settings
        n_threads = settings.n_threads
        options: dict[str, Any] = {"verbose": False, "n_threads": n_threads, "n_threads_batch": n_threads}
        if method is None:
            return Llama(settings.model, vocab_only=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a model runs densely is said in the results
            return Llama(
                settings.model, n_ctx=n_ctx, retrieval=self.retrieval(method), kv_type=self.kv_type(method), **options
            )

    def _drop(self) -> None:
        if self._llm is not None:
            self._llm.close()
        self._llm = self._key = None
