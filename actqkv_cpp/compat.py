"""How `Llama` treats every constructor argument and public member of llama_cpp.Llama 0.3.36: one table.

docs/llama_cpp.md is this table, rendered by `python -m actqkv_cpp.compat > docs/llama_cpp.md`; a test compares them,
and another walks the rows against llama_cpp.Llama itself. The treatments:

    honoured  does what it does in llama_cpp.Llama
    mapped    reaches our engine under another name or with another meaning, said in the note
    dense     a value other than the default runs the model through a llama.cpp context, with a one-line warning
    refused   raises, with the reason
    new       ours
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from actqkv_cpp.errors import ParameterError, unknown_name

if TYPE_CHECKING:
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
    from llama_cpp.llama_speculative import LlamaDraftModel
    from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

Treatment = Literal["honoured", "mapped", "dense", "refused", "new"]


@dataclass(frozen=True)
class Row:
    """One argument ("argument") or public attribute or method ("member")."""

    name: str
    kind: Literal["argument", "member"]
    treatment: Treatment
    note: str


def _rows(kind: Literal["argument", "member"], treatment: Treatment, notes: Mapping[str, str]) -> list[Row]:
    return [Row(name, kind, treatment, note) for name, note in notes.items()]


TABLE: tuple[Row, ...] = (
    *_rows(
        "argument",
        "honoured",
        {
            "model_path": "left out: the bundled model",
            "n_gpu_layers": "layers on GPUs, from the last on; None: as many as fit; refused where they do not fit",
            "split_mode": "weights",
            "main_gpu": "weights",
            "tensor_split": "weights",
            "vocab_only": "tokenizer only; evaluating raises StateError",
            "use_mmap": "weights",
            "use_mlock": "weights",
            "kv_overrides": "weights and metadata",
            "seed": "",
            "n_ctx": 'also "128k"; 0 is the trained length; may exceed the trained length (positions "auto")',
            "no_perf": "",
            "last_n_tokens_size": "",
            "numa": "",
            "chat_format": "also of read(), ask() and chat(); left out, they use the model's own template, or "
            '"Question: ... Answer:" where it has none',
            "tokenizer": "read, ask and chat use the model's own",
            "spm_infill": "",
            "verbose": "",
            "logits_all": "`scores` has a row per token read, kept as it comes, not n_ctx x n_vocab beforehand; "
            "without logits_all the last row alone: any other, and a slice with another, raises IndexError",
        },
    ),
    *_rows(
        "argument",
        "mapped",
        {
            "n_batch": "no effect on results: a window is Retrieval.window tokens; reported by .n_batch",
            "n_ubatch": "as n_batch",
            "n_threads": "threads of reading and answering; default: all cores this process may use",
            "n_threads_batch": "used where n_threads is not given: one pool reads and answers",
            "type_k": "kv_type of the same name (f16, q8_0, q4_0), equal to type_v; any other type is refused",
            "type_v": "as type_k",
            "flash_attn": "no effect: attention is always fused",
            "offload_kqv": "no effect: chunks live in CPU RAM",
            "op_offload": "no effect: as offload_kqv",
            "swa_full": "no effect: models with sliding windows run densely",
        },
    ),
    *_rows(
        "argument",
        "dense",
        {
            "embedding": "embeddings need all tokens of a batch at once",
            "pooling_type": "as embedding",
            "attention_type": "other than causal is for embeddings",
            "draft_model": "speculative decoding takes tokens back at every step",
            "lora_path": "our graph has no adapters",
            "lora_base": "as lora_path",
            "lora_scale": "as lora_path",
            "rope_scaling_type": "our positions follow the model's metadata; kv_overrides can change that",
            "rope_freq_base": "as rope_scaling_type",
            "rope_freq_scale": "as rope_scaling_type",
            "yarn_ext_factor": "as rope_scaling_type",
            "yarn_attn_factor": "as rope_scaling_type",
            "yarn_beta_fast": "as rope_scaling_type",
            "yarn_beta_slow": "as rope_scaling_type",
            "yarn_orig_ctx": "as rope_scaling_type",
            "chat_handler": "handlers with images write to a llama.cpp context; others are honoured by our engine, "
            "in create_chat_completion alone: read() and chat() take chat_format",
        },
    ),
    *_rows(
        "argument",
        "new",
        {
            "retrieval": "what is attended: a Retrieval",
            "kv_type": 'type of stored chunks: "f16", "q8_0" or "q4_0"',
            "kv_file": "KV file that read() writes, and that stands for keys and values in memory",
            "vram": 'bytes of a GPU\'s memory for attention, also "6g"; 0: none; default: what is free',
        },
    ),
    *_rows(
        "member",
        "honoured",
        {
            "__call__": "",
            "create_completion": "",
            "create_chat_completion": "",
            "create_chat_completion_openai_v1": "",
            "detokenize": "",
            "from_pretrained": "",
            "logits_to_logprobs": "",
            "longest_token_prefix": "",
            "model": "",
            "n_embd": "",
            "n_vocab": "",
            "reset": "",
            "sample": "",
            "set_cache": "",
            "set_seed": "",
            "token_bos": "",
            "token_eos": "",
            "token_nl": "",
            "tokenize": "",
            "tokenizer": "",
            "eval_tokens": "",
            "__getstate__": "pickles the arguments, as the base does",
            "__setstate__": "",
            "close": "while another thread computes it raises ThreadError and frees nothing",
            "pooling_type": "",
        },
    ),
    *_rows(
        "member",
        "mapped",
        {
            "eval": "reads windows into the session; a token that sample() just returned is a decode step",
            "generate": "prefix reuse rewinds the session",
            "n_ctx": "exact, not rounded up to 256",
            "save_state": "llama_state holds the session's own blob",
            "load_state": "takes states of the same model and parameters; others raise StateError",
            "eval_logits": "the rows that are kept, as in `scores`: all with logits_all, else the last one",
            "ctx": "a context of llama.cpp that holds no tokens; low-level calls on it do not see the session",
        },
    ),
    *_rows(
        "member",
        "refused",
        {
            "embed": "raises RuntimeError unless embedding=True, as the base does",
            "create_embedding": "as embed",
        },
    ),
    *_rows(
        "member",
        "new",
        {
            "engine": '"actqkv" or "llama.cpp"',
            "engine_reason": "why it is llama.cpp, or None",
            "session": "the native session, or None",
            "gpu_layers": "how many layers are on GPUs, and why not all",
            "gpu": "where attention runs on a GPU, or why it does not",
            "document": "the latest reading, also an interrupted one, or None",
            "read": "read documents into the session: a Document",
            "open": "open a KV file: a Document that was read before",
            "chat": "a conversation, over documents or none: a Chat",
            "answering": "within the block, answers by another method or budget over the same reading",
            "audit": "check the retrieval while answering, and widen the budget where it misses",
            "record": "within the block, what every layer does in every window: a Recording",
            "count_tokens": "tokens of a text as a document",
            "n_ctx_train": "tokens that the model was trained on; 0 where its file does not say",
        },
    ),
)

ARGUMENTS = {row.name: row for row in TABLE if row.kind == "argument"}


class LlamaOptions(TypedDict, total=False):
    """Constructor arguments of llama_cpp.Llama, except model_path."""

    n_gpu_layers: int | None
    split_mode: int
    main_gpu: int
    tensor_split: list[float] | None
    vocab_only: bool
    use_mmap: bool
    use_mlock: bool
    kv_overrides: dict[str, bool | int | float | str] | None
    seed: int
    n_ctx: int | str
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_threads_batch: int | None
    rope_scaling_type: int | None
    pooling_type: int
    attention_type: int
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    logits_all: bool
    embedding: bool
    offload_kqv: bool
    flash_attn: bool
    op_offload: bool | None
    swa_full: bool | None
    no_perf: bool
    last_n_tokens_size: int
    lora_base: str | None
    lora_scale: float
    lora_path: str | None
    numa: bool | int
    chat_format: str | None
    chat_handler: LlamaChatCompletionHandler | None
    draft_model: LlamaDraftModel | None
    tokenizer: BaseLlamaTokenizer | None
    type_k: int | None
    type_v: int | None
    spm_infill: bool
    verbose: bool


def base_defaults() -> dict[str, Any]:
    """Default of each constructor argument of llama_cpp.Llama, read from its signature."""
    import llama_cpp  # noqa: PLC0415 (heavy)

    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def signature(constructor: Callable[..., None]) -> inspect.Signature:
    """The signature of our constructor with the base's arguments and their defaults in place of `**options`."""
    import llama_cpp  # noqa: PLC0415 (heavy)

    base = inspect.signature(llama_cpp.Llama.__init__).parameters.values()
    ours = [p for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return inspect.Signature([*ours, *(p for p in base if p.kind is p.KEYWORD_ONLY)])


def check_names(options: Mapping[str, Any]) -> None:
    """ParameterError, with the nearest known name, for an option that no row knows (the base swallows such names)."""
    for name in options:
        if name not in ARGUMENTS:
            raise unknown_name("argument of Llama", name, ARGUMENTS)


def dense_reason(options: Mapping[str, Any]) -> str | None:
    """Why these options need a llama.cpp context: the first dense one that is not at its default; None if none is."""
    from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler  # noqa: PLC0415 (heavy)

    defaults = base_defaults()
    for name, value in options.items():
        row = ARGUMENTS[name]
        if row.treatment != "dense" or value is None or value == defaults[name]:
            continue
        if name == "chat_handler" and not isinstance(value, (Llava15ChatHandler, MTMDChatHandler)):
            continue
        source = row.note.removeprefix("as ")
        return f"{name}: {ARGUMENTS[source].note if source in ARGUMENTS else row.note}"
    return None


def render() -> str:
    """The table as Markdown: docs/llama_cpp.md."""
    lines = [
        "# actqkv_cpp.Llama beside llama_cpp.Llama",
        "",
        "Written by `python -m actqkv_cpp.compat > docs/llama_cpp.md`; the table lives in `actqkv_cpp/compat.py`.",
        "Code for `llama_cpp.Llama` (0.3.36) runs with the import changed; unknown names raise `ParameterError`.",
        "",
        "* **honoured**: as in llama_cpp.Llama",
        "* **mapped**: reaches our engine with another name or meaning",
        "* **dense**: other than the default, the model runs through a llama.cpp context, with a warning "
        '(`llm.engine == "llama.cpp"`); so do models whose architecture our graph lacks',
        "* **refused**: raises",
        "* **new**: ours",
        "",
    ]
    for title, kind in (("Constructor arguments", "argument"), ("Attributes and methods", "member")):
        lines += [f"## {title}", "", "| name | treatment | note |", "|---|---|---|"]
        rows = sorted((row for row in TABLE if row.kind == kind), key=lambda row: row.name.strip("_"))
        lines += [f"| `{row.name}` | {row.treatment} | {row.note} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def kv_type(ours: str, options: dict[str, Any], known: Mapping[str, int]) -> str:
    """The kv_type meant by our argument and llama_cpp's type_k and type_v, of those `known` by ggml's numbers."""
    types = {name: options[name] for name in ("type_k", "type_v") if options.get(name) is not None}
    if not types:
        return ours
    names = {name: next((kept for kept, value in known.items() if value == t), None) for name, t in types.items()}
    found = set(names.values()) | ({"f16"} if len(types) == 1 else set()) | ({ours} - {"f16"})
    if len(found) != 1 or None in found:
        given = ", ".join(f"{name}={value}" for name, value in types.items())
        raise ParameterError(
            f"K and V are stored in one type, not {given} with kv_type={ours!r}",
            f"give kv_type, one of {', '.join(known)}",
        )
    return cast(str, found.pop())


if __name__ == "__main__":
    print(render(), end="")
