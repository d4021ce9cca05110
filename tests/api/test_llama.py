"""Breaks when code written for llama_cpp.Llama gives something else with actqkv_cpp.Llama (dense method)."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from llama_cpp._internals import LlamaContext, LlamaModel
from llama_oracle import PlainLlama

from actqkv_cpp import (
    ContextError,
    Llama,
    ModelError,
    ParameterError,
    Retrieval,
    StateError,
    ThreadError,
    default_model_path,
)
from actqkv_cpp._native import Session

PROMPT = "the key of the house was found in the green river and the answer"
DENSE = Retrieval("dense", n_local=64, window=32, n_sink=4, chunk=16, budget=128)
GRAMMAR = 'root ::= "yes " [0-9] [0-9] "."'
MESSAGES: Any = [{"role": "system", "content": "the book"}, {"role": "user", "content": "where is the key"}]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Iterator[PlainLlama]:
    llm = PlainLlama(str(tiny_model), n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def ours(tiny_model: Path) -> Iterator[Llama]:
    llm = Llama(tiny_model, n_ctx=1024, n_threads=1, logits_all=True, verbose=False, retrieval=DENSE)
    assert llm.engine == "actqkv"
    yield llm
    llm.close()


def _text(answer: Any) -> Any:
    """What a caller sees, less the identifiers and times."""
    return {key: value for key, value in answer.items() if key not in {"id", "created", "model"}}


def _assert_close(one: Any, two: Any) -> None:
    """Equal but for rounding: K and V are stored in F16 by both, the arithmetic has another order."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            _assert_close(a, b)
    elif isinstance(one, (float, np.floating)):
        assert one == pytest.approx(two, abs=5e-3)
    else:
        assert one == two


COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"temperature": 0.9, "seed": 7},
    "top_k top_p min_p typical_p": {"seed": 1, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.9},
    "penalties": {"temperature": 0.0, "repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "mirostat 1": {"mirostat_mode": 1, "seed": 3},
    "mirostat 2": {"mirostat_mode": 2, "seed": 3},
    "stop": {"temperature": 0.0, "stop": ["a", "e"]},
    "echo": {"temperature": 0.0, "echo": True},
    "suffix": {"temperature": 0.0, "suffix": " and"},
    "logit_bias": {"temperature": 0.0, "logit_bias": {300: 50.0}},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "logprobs echo": {"temperature": 0.0, "logprobs": 2, "echo": True},
    "empty prompt": {"prompt": "", "temperature": 0.0},
    "tokens as prompt": {"prompt": [1, 300, 301, 302], "temperature": 0.0},
    "unlimited": {"temperature": 0.0, "max_tokens": -1, "prompt": PROMPT * 15},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion(name: str, base: PlainLlama, ours: Llama) -> None:
    """Breaks when an option of create_completion does something else than in llama_cpp."""
    options = {"prompt": PROMPT, "max_tokens": 12} | COMPLETIONS[name]
    expected, found = (_text(llm.create_completion(**options)) for llm in (base, ours))
    _assert_close(found, expected)


@pytest.mark.parametrize("name", ["greedy", "stop", "logprobs", "seed"])
def test_streaming(name: str, base: PlainLlama, ours: Llama) -> None:
    """Breaks when a stream's pieces differ, or do not add up to the text."""
    options = {"prompt": PROMPT, "max_tokens": 12, "stream": True} | COMPLETIONS[name]
    expected, found = ([_text(chunk) for chunk in llm.create_completion(**options)] for llm in (base, ours))
    _assert_close(found, expected)


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "json": {"response_format": {"type": "json_object"}},
    "json schema": {
        "response_format": {
            "type": "json_object",
            "schema": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]},
        }
    },
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "tools": {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look",
                    "description": "look somewhere",
                    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
    },
    "max_tokens": {"max_tokens": 3},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_chat_completion(name: str, stream: bool, base: PlainLlama, ours: Llama) -> None:
    """Breaks when an option of create_chat_completion does something else than in llama_cpp."""
    options = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0.0, "seed": 5, "stream": stream} | CHATS[name]

    def run(llm: Any) -> Any:
        answer = llm.create_chat_completion(**options)
        return [_text(chunk) for chunk in answer] if stream else [_text(answer)]

    expected, found = run(base), run(ours)
    for chunks in (expected, found):
        for chunk in chunks:
            for choice in chunk["choices"]:
                for call in (choice.get("message") or choice["delta"]).get("tool_calls") or []:
                    call["id"] = ""  # random in both
    _assert_close(found, expected)


def test_call_is_create_completion(ours: Llama) -> None:
    """Breaks when llm(...) and llm.create_completion(...) differ."""
    one, two = (_text(f(PROMPT, max_tokens=5, temperature=0.0)) for f in (ours, ours.create_completion))
    assert one == two


def test_grammar(ours: Llama) -> None:
    """Breaks when a grammar does not bind the samples."""
    grammar = LlamaGrammar.from_string(GRAMMAR, verbose=False)
    text = ours.create_completion(PROMPT, grammar=grammar, max_tokens=12, seed=1)["choices"][0]["text"]  # type: ignore[index]
    assert text.startswith("yes ")
    assert text[4:6].isdigit()


def test_logits_processor_and_stopping_criteria(base: PlainLlama, ours: Llama) -> None:
    """Breaks when user functions see other tokens or other logits."""
    seen: dict[int, list[Any]] = {id(base): [], id(ours): []}

    def run(llm: Any) -> Any:
        def only_even(tokens: Any, scores: Any) -> Any:
            seen[id(llm)].append((len(tokens), int(np.argmax(scores))))
            scores[1::2] = -np.inf
            return scores

        processors = LogitsProcessorList([only_even])
        stop = StoppingCriteriaList([lambda tokens, logits: len(tokens) > 25])
        return _text(
            llm.create_completion(
                PROMPT, max_tokens=20, temperature=0.0, logits_processor=processors, stopping_criteria=stop
            )
        )

    assert run(ours) == run(base)
    assert seen[id(ours)] == seen[id(base)]


def test_generate_and_send(base: PlainLlama, ours: Llama) -> None:
    """Breaks when tokens sent into the generator are not read."""

    def run(llm: Any) -> list[int]:
        tokens = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
        found = [next(tokens), next(tokens), tokens.send([300, 301]), next(tokens)]
        tokens.close()
        return [*found, llm.n_tokens, *llm.eval_tokens]

    assert run(ours) == run(base)


def test_eval_sample_loop(base: PlainLlama, ours: Llama) -> None:
    """Breaks when the low-level loop of llama_cpp's documentation gives other tokens or logits."""

    def run(llm: Any) -> tuple[list[int], Any]:
        llm.reset()
        llm.eval(llm.tokenize(PROMPT.encode()))
        found = []
        for _ in range(5):
            found.append(llm.sample(temp=0.0))
            llm.eval([found[-1]])
        return found, np.array(llm.eval_logits)

    (ours_found, ours_logits), (base_found, base_logits) = run(ours), run(base)
    assert ours_found == base_found
    assert ours_logits.shape == base_logits.shape
    assert np.abs(ours_logits - base_logits).max() < 1e-2  # of logits of a few units
    phases = ours.session.history()[1].tolist()  # type: ignore[union-attr]
    assert phases == [0] * (len(phases) - 5) + [1] * 5


def test_sample_with_index(ours: Llama) -> None:
    """Breaks when sample(idx=...) takes another row, or makes up logits that were not kept."""
    ours.reset()
    ours.eval([1, 300, 301, 302])
    assert ours.sample(temp=0.0, idx=1) == int(np.argmax(ours.scores[1, :]))
    ours.reset()
    with pytest.raises(StateError, match="no logits"):
        ours.sample()


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}, {"logprobs": 1, "echo": True}], ids=str)
def test_scores_after_a_completion(options: dict[str, Any], base: PlainLlama, ours: Llama) -> None:
    """Breaks when logits_all does not keep the row of every token, those of a reused prefix included."""
    for _ in range(2):
        for llm in (base, ours):
            llm.create_completion(PROMPT, max_tokens=4, temperature=0.0, **options)
        n = ours.n_tokens
        assert n == base.n_tokens == len(ours.scores)
        found, expected = ours.scores[:n], base.scores[:n]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-2  # of logits of a few units
        assert np.array_equal(np.array(ours.scores), found)
    assert len(ours.eval_logits) == len(base.eval_logits)


def test_scores_without_logits_all(tiny_model: Path) -> None:
    """Breaks when a completion keeps n_ctx x n_vocab logits, or rows that were not kept are made up."""
    with Llama(tiny_model, n_ctx=512, n_threads=1, verbose=False, retrieval=DENSE) as llm:
        llm.create_completion(PROMPT, max_tokens=4, temperature=0.0)
        assert len(llm._rows.kept()) == len(llm.eval_logits) == 1
        assert int(np.argmax(llm.scores[llm.n_tokens - 1])) == llm.sample(temp=0.0)
        with pytest.raises(IndexError, match="logits_all=True"):
            llm.scores[: llm.n_tokens, :]


def test_logprobs_after_rows_were_lost(base: PlainLlama, ours: Llama) -> None:
    """Breaks when a reused prefix without rows, as of a loaded state, ends a completion with logprobs."""
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "logprobs": 2}
    ours.eval(ours.tokenize(PROMPT.encode()))
    state = ours.save_state()
    state.scores = state.scores[-1:]
    ours.load_state(state)
    _assert_close(*(_text(llm.create_completion(PROMPT, **options)) for llm in (ours, base)))


def test_prefix_reuse(ours: Llama, tiny_model: Path) -> None:
    """Breaks when a shared prefix is read again, or its reuse changes the result."""
    ours.reset()
    ours.create_completion(PROMPT * 4, max_tokens=2, temperature=0.0)
    assert ours.session is not None
    ours.session.stats_reset()
    again = ours.create_completion(PROMPT * 4 + " who", max_tokens=6, temperature=0.0)
    assert ours.session.stats().n_prefill_tokens < 64
    with Llama(tiny_model, n_ctx=1024, n_threads=1, verbose=False, retrieval=DENSE) as fresh:
        expected = fresh.create_completion(PROMPT * 4 + " who", max_tokens=6, temperature=0.0)
    assert _text(again) == _text(expected)


def test_last_token_of_a_prompt_is_a_decode_step(ours: Llama) -> None:
    """Breaks when the answer's first token shares its plan with the prompt, or a reused token changes its phase."""
    ours.reset()
    tokens = ours.tokenize(PROMPT.encode())
    sampled = next(ours.generate(tokens, temp=0.0))
    next(ours.generate([*tokens, sampled], temp=0.0))
    assert ours.session is not None
    phases = ours.session.history()[1].tolist()
    assert phases == [0] * (len(phases) - 2) + [1, 1]  # the last of the first prompt, reused, and of the second


def test_a_prompt_that_was_not_read_leaves_nothing(ours: Llama) -> None:
    """Breaks when tokens that are read after a generation which failed before its prompt are taken for that prompt."""
    ours.reset()
    with pytest.raises(ParameterError, match="does not parse"):
        next(ours.generate([1, 300], grammar=LlamaGrammar(_grammar="root ::= (")))
    ours.eval([1, 300, 301])
    assert ours.session is not None
    assert ours.session.history()[1].tolist() == [0, 0, 0]


def test_save_and_load_state(ours: Llama) -> None:
    """Breaks when a state does not continue where it was taken, also after other use and through pickle."""
    ours.reset()
    ours.eval(ours.tokenize(PROMPT.encode()))
    state = pickle.loads(pickle.dumps(ours.save_state()))
    assert type(state.llama_state) is bytes
    expected = [ours.sample(temp=0.0)]
    ours.eval(expected)
    expected.append(ours.sample(temp=0.0))
    ours.reset()
    ours.eval([1, 300])
    ours.load_state(state)
    found = [ours.sample(temp=0.0)]
    ours.eval(found)
    assert [*found, ours.sample(temp=0.0)] == expected


def test_state_of_another_engine(base: PlainLlama, ours: Llama) -> None:
    """Breaks when a state of llama.cpp is taken for one of ours."""
    base.eval([1, 300, 301])
    with pytest.raises(StateError):
        ours.load_state(base.save_state())


def test_cache(ours: Llama) -> None:
    """Breaks when llama_cpp's prompt caches do not work with our states."""
    ours.set_cache(llama_cpp.LlamaRAMCache())
    try:
        one = ours.create_completion(PROMPT, max_tokens=4, temperature=0.0)
        ours.create_completion("page", max_tokens=4, temperature=0.0)
        two = ours.create_completion(PROMPT, max_tokens=4, temperature=0.0)
    finally:
        ours.set_cache(None)
    assert _text(one) == _text(two)


def test_pickle(tiny_model: Path) -> None:
    """Breaks when a Llama cannot be sent to another process with its arguments."""
    with Llama(tiny_model, n_ctx=640, n_batch=99, n_threads=1, verbose=False, retrieval=DENSE, logits_all=True) as llm:
        copy = pickle.loads(pickle.dumps(llm))
    assert (copy.n_ctx(), copy.n_batch, copy.retrieval, copy._logits_all) == (640, 99, DENSE, True)
    assert copy.session.params.n_threads == 1
    assert copy.engine == "actqkv"
    copy.close()


def _too_long(llm: Any) -> str:
    with pytest.raises(ValueError, match="exceed context window") as caught:
        llm.create_completion("key " * 2000, max_tokens=4)
    return str(caught.value)


def test_prompt_too_long(base: PlainLlama, ours: Llama) -> None:
    """Breaks when a prompt beyond n_ctx raises something else than in llama_cpp."""
    assert _too_long(ours) == _too_long(base)
    with pytest.raises(ContextError, match="1024"):
        ours.eval([300] * 1025)


def test_context_fills_up(base: PlainLlama, ours: Llama) -> None:
    """Breaks when an answer that fills n_ctx ends otherwise than with finish_reason "length"."""
    for llm in (base, ours):
        tokens = llm.tokenize(PROMPT.encode()) * 90
        answer: Any = llm.create_completion(tokens[:1020], max_tokens=50, temperature=0.0, logit_bias={300: 99.0})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 1024


def test_n_ctx(tiny_model: Path) -> None:
    """Breaks when n_ctx=0 is not the trained length, or sizes as people write them are refused."""
    for given, expected in ((0, 2048), ("1k", 1024), (512, 512)):
        with Llama(tiny_model, n_ctx=given, n_threads=1, verbose=False) as llm:
            assert llm.n_ctx() == expected == len(llm.input_ids)


def test_arguments_that_abort_libllama(ours: Llama) -> None:
    """Breaks when a token or a grammar kills Python, as it does through llama_cpp."""
    for token in (-1, 512, 10**9):
        with pytest.raises(ParameterError, match=f"token 1 is {token}, expected 0 to 511"):
            ours.detokenize([300, token])
    for text, words in (("root ::= (((", "does not parse"), ('rule ::= "a"', "no rule 'root'")):
        with pytest.raises(ParameterError, match=words):
            ours.create_completion("the", max_tokens=2, grammar=LlamaGrammar.from_string(text, verbose=False))
    unspeakable = LlamaGrammar.from_string(r'root ::= "\u0000"', verbose=False)
    with pytest.raises(StateError, match="no token of the model may follow"):
        ours.create_completion("the", max_tokens=2, grammar=unspeakable)
    assert ours.create_completion("the", max_tokens=2)["usage"]["completion_tokens"] > 0  # type: ignore[index]


def test_nothing_to_sample_from(ours: Llama) -> None:
    """Breaks when an empty prompt, or a row that is not there, ends in the words of an array."""
    ours.reset()
    ours.n_tokens = 0
    for call in (lambda: ours.create_completion([], max_tokens=2), lambda: ours.sample(idx=-1000)):
        with pytest.raises(StateError, match="no logits to sample from"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_batch": -1}, "n_batch is -1"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"kv_overrides": {"llama.block_count": 10**6}}, "block_count is 1000000"),
        ({"lora_path": "none.gguf"}, r"no such adapter: none\.gguf"),
        ({"lora_path": __file__}, "is not a GGUF model"),
        ({"lora_path": str(default_model_path())}, "expected an adapter for llama"),
    ],
)
def test_options_that_abort_libllama(options: dict[str, Any], words: str, tiny_model: Path) -> None:
    """Breaks when an option kills Python, as it does through llama_cpp."""
    with pytest.raises((ParameterError, ModelError), match=words):
        Llama(tiny_model, verbose=False, n_threads=1, **options)


@pytest.mark.parametrize("method", ["actqkv", "llama.cpp"])
def test_closed(method: str, tiny_model: Path) -> None:
    """Breaks when a closed Llama reaches freed memory, which kills Python, or closing twice fails."""
    llm = Llama(tiny_model, n_threads=1, verbose=False, retrieval=Retrieval(method))
    document = llm.read(text="the key")
    llm.close()
    llm.close()
    calls: list[Callable[[], object]] = [
        lambda: llm.eval([1]),
        llm.save_state,
        lambda: llm.create_completion([1, 300]),
        lambda: llm.create_completion("the"),
        lambda: llm.create_chat_completion(MESSAGES),
        lambda: llm.tokenize(b"the"),
        lambda: llm.detokenize([300]),
        lambda: llm.count_tokens("the"),
        llm.token_eos,
        llm.n_vocab,
        llm.n_ctx,
        lambda: llm.n_ctx_train,
        lambda: llm.read(text="the"),
        lambda: llm.open("a.akv"),
        llm.chat,
        lambda: document.ask("where"),
    ]
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()


def test_second_thread_changes_nothing(ours: Llama) -> None:
    """Breaks when a thread that is refused has already changed what the other thread is doing."""
    refused: list[str] = []

    def other() -> None:
        for call in (lambda: ours.create_completion("the", max_tokens=1), lambda: ours.eval([300]), ours.save_state):
            with pytest.raises(ThreadError) as caught:
                call()
            refused.append(str(caught.value))

    def during(done: int, total: int) -> None:
        thread = threading.Thread(target=other, name="intruder")
        thread.start()
        thread.join()

    ours.reset()
    sampler = ours._sampler
    ours._feed(np.full(20, 300, np.int32), progress=during)
    assert len(refused) >= 3
    assert "intruder" in refused[0]
    assert (ours.n_tokens, ours._sampler) == (20, sampler)


def test_close_while_another_thread_reads(tiny_model: Path) -> None:
    """Breaks when close() frees what another thread computes with: the process ends with SIGSEGV."""
    llm = Llama(tiny_model, n_ctx=1024, n_threads=1, verbose=False, retrieval=DENSE)
    second = Session(llm._model, DENSE, n_ctx=512, n_threads=1)
    n_refused = 0

    def intrude() -> None:
        nonlocal n_refused
        for close in (llm.close, llm._model.close):
            with pytest.raises(ThreadError, match="intruder"):
                close()
            n_refused += 1

    def during(done: int, total: int) -> None:
        thread = threading.Thread(target=intrude, name="intruder")
        thread.start()
        thread.join()
        assert llm._model.model is not None
        assert not llm.session.closed  # type: ignore[union-attr]
        assert not second.closed

    llm.read(text="the key", progress=during)
    second.progress = during
    second.decode([300, 301])
    assert n_refused >= 4
    llm.close()
    assert second.closed


@pytest.mark.parametrize(
    ("method", "kind", "name"), [("actqkv", LlamaModel, "tokenize"), ("llama.cpp", LlamaContext, "decode")]
)
def test_close_while_another_thread_is_in_llama_cpp(
    method: str, kind: type[Any], name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when close() frees a model that libllama tokenises or computes with: the process ends with SIGSEGV."""
    inside, go_on = threading.Event(), threading.Event()
    original = getattr(kind, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert go_on.wait(10)
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, name, slow)
    with Llama(tiny_model, n_threads=1, verbose=False, retrieval=Retrieval(method)) as llm:
        reader = threading.Thread(target=lambda: llm.read(text="the key"))
        reader.start()
        assert inside.wait(10)
        try:
            with pytest.raises(ThreadError, match="another thread"):
                llm.close()
            assert llm._model.model is not None
        finally:
            go_on.set()
            reader.join()
        assert llm.document.ask("where", max_tokens=1).usage.document_tokens > 0  # type: ignore[union-attr]


def test_interrupted_eval_keeps_what_was_read(ours: Llama) -> None:
    """Breaks when n_tokens and the session disagree after an interruption."""
    ours.reset()
    assert ours.session is not None

    def stop(done: int, total: int) -> bool:
        if done >= 100:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        ours._feed(np.full(500, 300, np.int32), progress=stop)
    assert 100 <= ours.n_tokens == ours.session.n_past < 500
    with pytest.raises(StateError, match="no logits"):  # those of the token before the interrupted ones are not it
        ours.sample()
    ours.eval([301])
    assert ours.n_tokens == ours.session.n_past
