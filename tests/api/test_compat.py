"""Breaks when an argument or member of llama_cpp.Llama is untreated, or treated otherwise than documented."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Llava15ChatHandler
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp.llama_tokenizer import LlamaTokenizer

from actqkv_cpp import GpuUse, Llama, NoGpu, ParameterError, Retrieval, StateError, compat
from actqkv_cpp._native import KV_TYPES

SMALL = Retrieval("dense", n_local=64, window=32, n_sink=4, chunk=16, budget=128)
ROWS = {(row.kind, row.name): row for row in compat.TABLE}


class _WithImages(Llava15ChatHandler):
    """A handler of the kind that writes images to a llama.cpp context; it never runs here."""

    def __init__(self) -> None:
        self._exit_stack = None

    def __del__(self) -> None: ...


# A value other than the default for every argument, one that a tiny model can be loaded with.
VALUES: dict[str, Any] = {
    "n_gpu_layers": 1, "split_mode": 0, "main_gpu": 0, "tensor_split": [1.0], "vocab_only": True, "use_mmap": False,
    "use_mlock": True, "kv_overrides": {"llama.context_length": 1024}, "seed": 5, "n_ctx": 300, "n_batch": 64,
    "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1, "rope_scaling_type": 1, "pooling_type": 1,
    "attention_type": 1, "rope_freq_base": 5000.0, "rope_freq_scale": 0.5, "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 2.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_orig_ctx": 512, "logits_all": True,
    "embedding": True, "offload_kqv": False, "flash_attn": True, "op_offload": False, "swa_full": True,
    "no_perf": True, "last_n_tokens_size": 32, "lora_base": "no.gguf", "lora_scale": 0.5, "lora_path": "no.gguf",
    "numa": 0, "chat_format": "chatml", "chat_handler": _WithImages(), "draft_model": LlamaPromptLookupDecoding(),
    "tokenizer": None, "type_k": 1, "type_v": 1, "spm_infill": True, "verbose": False,
}  # fmt: skip


# Where an argument can be seen again. The others change nothing that can be asked for.
ARRIVED: dict[str, Any] = {
    "n_gpu_layers": lambda m: m.model_params.n_gpu_layers,
    "split_mode": lambda m: m.model_params.split_mode,
    "main_gpu": lambda m: m.model_params.main_gpu,
    "tensor_split": lambda m: m.tensor_split,
    "kv_overrides": lambda m: {"llama.context_length": m._model.n_ctx_train()},
    "use_mmap": lambda m: m.__getstate__()["use_mmap"],
    "use_mlock": lambda m: m.__getstate__()["use_mlock"],
    "seed": lambda m: m._seed,
    "n_ctx": lambda m: m.session.params.n_ctx,
    "n_batch": lambda m: m.n_batch,
    "n_threads": lambda m: m.session.params.n_threads,
    "logits_all": lambda m: m._logits_all,
    "flash_attn": lambda m: m.__getstate__()["flash_attn"],
    "no_perf": lambda m: m.context_params.no_perf,
    "last_n_tokens_size": lambda m: m.last_n_tokens_size,
    "numa": lambda m: m.numa,
    "chat_format": lambda m: m.chat_format,
    "spm_infill": lambda m: m.spm_infill,
    "verbose": lambda m: m.verbose,
    "type_k": lambda m: KV_TYPES[m.session.params.kv_type],
    "type_v": lambda m: KV_TYPES[m.session.params.kv_type],
}


def test_every_argument_has_a_row() -> None:
    """Breaks when llama_cpp.Llama has an argument that the table, the types or this file do not know."""
    arguments = {name for kind, name in ROWS if kind == "argument"}
    base = set(compat.base_defaults()) | {"model_path"}
    assert arguments - base == {row.name for row in compat.TABLE if (row.kind, row.treatment) == ("argument", "new")}
    assert base <= arguments
    assert set(compat.LlamaOptions.__annotations__) == base - {"model_path"} == set(VALUES)


def test_every_member_has_a_row() -> None:
    """Breaks when either Llama has a public member that the table does not know, or the table invents one."""
    public = {name for name in vars(llama_cpp.Llama) if not name.startswith("_")}
    public |= {"__call__", "__getstate__", "__setstate__"}
    members = {name for kind, name in ROWS if kind == "member"}
    new = {row.name for row in compat.TABLE if (row.kind, row.treatment) == ("member", "new")}
    assert members == public | new
    ours = {name for name in vars(Llama) if not name.startswith("_")}
    assert ours - members == {"model_params"}  # an attribute of the base's instances
    assert len(ROWS) == len(compat.TABLE)


@pytest.mark.parametrize("name", [n for n in VALUES if ROWS["argument", n].treatment in {"honoured", "mapped"}])
def test_honoured_and_mapped_arguments(name: str, tiny_model: Path) -> None:
    """Breaks when an argument sends the model to llama.cpp, fails, or is swallowed."""
    given = {"verbose": False, "n_threads": 1, "retrieval": SMALL, name: VALUES[name]}
    given |= {"type_v": 1} if name == "type_k" else {"type_k": 1} if name == "type_v" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = Llama(tiny_model, **given)
    try:
        if name == "vocab_only":
            assert llm.tokenize(b"key")
            with pytest.raises(StateError, match="vocab_only"):
                llm.eval([1])
            return
        assert llm.engine == "actqkv"
        if name in ARRIVED:
            assert ARRIVED[name](llm) == VALUES[name]
        assert llm.create_completion("key", max_tokens=2)
    finally:
        llm.close()


DENSE = [n for n in VALUES if ROWS["argument", n].treatment == "dense"]


@pytest.mark.parametrize("name", DENSE)
def test_dense_arguments(name: str) -> None:
    """Breaks when an argument that our engine lacks does not give the reason for llama.cpp, or its default does."""
    reason = compat.dense_reason({name: VALUES[name]})
    assert reason is not None
    assert reason.startswith(f"{name}: ")
    assert " as " not in f" {reason.split(': ')[1]}"[:4]
    assert compat.dense_reason({name: compat.base_defaults()[name]}) is None


@pytest.mark.parametrize("name", ["embedding", "draft_model", "rope_freq_base", "yarn_orig_ctx"])
def test_dense_arguments_run(name: str, tiny_model: Path) -> None:
    """Breaks when a dense argument does not run through llama.cpp with one warning."""
    with pytest.warns(UserWarning, match=f"llama.cpp: {name}") as caught:
        llm = Llama(tiny_model, verbose=False, n_threads=1, **{name: VALUES[name]})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (llm.engine, llm.session) == ("llama.cpp", None)
    assert name in (llm.engine_reason or "")
    if name == "embedding":
        assert len(llm.embed("key")) > 0
    else:
        assert llm.create_completion("key", max_tokens=3, temperature=0.0)
    llm.close()


def test_chat_handler_without_images_is_ours() -> None:
    """Breaks when any chat handler sends the model to llama.cpp."""
    assert compat.dense_reason({"chat_handler": lambda **kwargs: None}) is None


@pytest.mark.parametrize("name", ["embed", "create_embedding"])
def test_refused_members(name: str, tiny: Llama) -> None:
    """Breaks when embeddings are made of a session that has none."""
    with pytest.raises(RuntimeError, match="embedding=True"):
        getattr(tiny, name)("key")


CALLS: dict[str, Any] = {
    "__call__": lambda m: m("key", max_tokens=1)["choices"],
    "create_completion": lambda m: m.create_completion("key", max_tokens=1)["choices"],
    "create_chat_completion": lambda m: m.create_chat_completion([{"role": "user", "content": "key"}], max_tokens=1),
    "create_chat_completion_openai_v1": lambda m: pytest.importorskip("openai"),
    "detokenize": lambda m: m.detokenize(m.tokenize(b"the key")) == b" the key" or m.detokenize([301]),
    "from_pretrained": lambda m: callable(m.from_pretrained),
    "logits_to_logprobs": lambda m: m.logits_to_logprobs([0.0, 1.0]).sum() < 0,
    "longest_token_prefix": lambda m: m.longest_token_prefix([1, 2], [1, 3]) == 1,
    "model": lambda m: m.model,
    "n_embd": lambda m: m.n_embd() == 128,
    "n_vocab": lambda m: m.n_vocab() == 512,
    "reset": lambda m: m.reset() is None and m.n_tokens == 0,
    "sample": lambda m: (m.eval([1, 300]), m.sample(temp=0.0) >= 0)[1],
    "set_cache": lambda m: m.set_cache(None) is None,
    "set_seed": lambda m: m.set_seed(3) is None and m._seed == 3,
    "token_bos": lambda m: m.token_bos() == 1,
    "token_eos": lambda m: m.token_eos() == 2,
    "token_nl": lambda m: isinstance(m.token_nl(), int),
    "tokenize": lambda m: m.tokenize(b"key")[0] == 1,
    "tokenizer": lambda m: isinstance(m.tokenizer(), LlamaTokenizer),
    "eval_tokens": lambda m: (m.reset(), m.eval([1, 300]), list(m.eval_tokens) == [1, 300])[2],
    "__getstate__": lambda m: m.__getstate__()["n_ctx"] == m.n_ctx(),
    "__setstate__": lambda m: callable(m.__setstate__),
    "close": lambda m: callable(m.close),
    "pooling_type": lambda m: m.pooling_type() <= 0,
    "eval": lambda m: (m.reset(), m.eval([1, 300]), m.n_tokens == 2)[2],
    "generate": lambda m: next(m.generate([1, 300])) >= 0,
    "n_ctx": lambda m: m.n_ctx() == 1024,
    "save_state": lambda m: m.save_state().llama_state_size > 0,
    "load_state": lambda m: m.load_state(m.save_state()) is None,
    "eval_logits": lambda m: (m.eval([300]), len(m.eval_logits) == 1)[1],
    "ctx": lambda m: llama_cpp.llama_n_ctx(m.ctx) > 0,
    "engine": lambda m: m.engine == "actqkv",
    "engine_reason": lambda m: m.engine_reason is None,
    "session": lambda m: m.session is not None,
    "gpu_layers": lambda m: m.gpu_layers.n == 0,
    "gpu": lambda m: isinstance(m.gpu, (GpuUse, NoGpu)),
    "document": lambda m: (m.read(text="the key"), m.document.name == "text")[1],
    "read": lambda m: m.read(text="the key").tokens_read > 0,
    "chat": lambda m: m.chat().messages == [],
    "count_tokens": lambda m: m.count_tokens("the key") > 0,
    "open": lambda m: (m.read(text="the key").save("key.akv"), m.open("key.akv").text == "the key")[1],
    "answering": lambda m: m.answering(None).__enter__() is None,
    "audit": lambda m: m.audit(0) is None,
    "record": lambda m: callable(m.record),
    "n_ctx_train": lambda m: m.n_ctx_train == 2048,
}


@pytest.mark.parametrize("name", [n for (k, n), row in ROWS.items() if k == "member" and row.treatment != "refused"])
def test_members(name: str, tiny: Llama) -> None:
    """Breaks when a public member of llama_cpp.Llama does not work over a session."""
    assert CALLS[name](tiny)


def test_signatures_are_the_bases() -> None:
    """Breaks when a method takes other arguments than llama_cpp.Llama's."""
    for name, method in inspect.getmembers(llama_cpp.Llama, inspect.isfunction):
        if name not in {"__init__", "_create_completion"}:
            assert [*inspect.signature(getattr(Llama, name)).parameters] == [*inspect.signature(method).parameters]


def test_signature_of_the_constructor() -> None:
    """Breaks when editors and help() do not show an argument, or with another default than it has."""
    found = inspect.signature(Llama).parameters
    assert [*found] == ["model_path", "retrieval", "kv_type", "kv_file", "vram", *compat.base_defaults()]
    assert {name: found[name].default for name in compat.base_defaults()} == compat.base_defaults()
    assert found["model_path"].default is found["retrieval"].default is None


@pytest.mark.parametrize(("name", "near"), [("n_cxt", "n_ctx"), ("retreival", "retrieval"), ("kv_typ", "kv_type")])
def test_unknown_argument(name: str, near: str, tiny_model: Path) -> None:
    """Breaks when a misspelt argument is swallowed, as the base does."""
    with pytest.raises(ParameterError, match=name) as caught:
        Llama(tiny_model, **{name: 5})  # type: ignore[arg-type]
    assert caught.value.hint == f"did you mean {near!r}?"


@pytest.mark.parametrize(
    "options", [{"type_k": 8}, {"type_k": 8, "type_v": 1}, {"type_k": 0, "type_v": 0}, {"kv_type": "f17"}]
)
def test_wrong_kv_types(options: dict[str, Any], tiny_model: Path) -> None:
    """Breaks when a type of K and V that we do not store is taken for another."""
    with pytest.raises(ParameterError):
        Llama(tiny_model, verbose=False, **options)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_kv_types_by_either_name(kv_type: str, tiny_model: Path) -> None:
    """Breaks when type_k and type_v of llama_cpp, where they agree, do not keep chunks as kv_type does."""
    by_number: dict[str, Any] = dict.fromkeys(("type_k", "type_v"), KV_TYPES[kv_type])
    for options in ({"kv_type": kv_type}, by_number, by_number | {"kv_type": kv_type}):
        with Llama(tiny_model, verbose=False, **options) as llm:
            assert llm.session is not None
            assert llm.session.params.kv_type == kv_type


def test_document_is_the_table() -> None:
    """Breaks when docs/llama_cpp.md was not written again after the table changed."""
    page = Path(__file__).parents[2] / "docs/llama_cpp.md"
    assert page.read_text() == compat.render(), "run: python -m actqkv_cpp.compat > docs/llama_cpp.md"
