"""Breaks when a bad model file kills Python or raises something else than ModelError with one line and a hint."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_gguf

from actqkv_cpp import ActqkvError, Llama, MemoryPlanError, ModelError, Retrieval

BAD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": tiny_gguf.make_empty_file,
    "text": tiny_gguf.make_not_gguf,
    "four bytes": lambda path: path.write_bytes(b"GGUF"),
    "truncated": tiny_gguf.make_truncated_gguf,
    "truncated early": lambda path: tiny_gguf.make_truncated_gguf(path, keep=0.01),
    "vocabulary only": tiny_gguf.make_vocab_only_gguf,
    "missing tensor": tiny_gguf.make_missing_tensor_gguf,
    "unknown architecture": tiny_gguf.make_unknown_arch_gguf,
    "partial rotary": lambda path: tiny_gguf.make_tiny_gguf(path, arch="qwen2", rope_dim=16),
}
for _kind in tiny_gguf.ABSURD_KINDS:
    BAD[f"absurd {_kind}"] = lambda path, kind=_kind: tiny_gguf.make_absurd_gguf(path, kind)  # type: ignore[misc]
for _key, _value in (*tiny_gguf.REFUSED_HPARAMS, *tiny_gguf.ABORTING_HPARAMS):
    BAD[f"{_key}={_value}"] = lambda path, key=_key, value=_value: tiny_gguf.make_absurd_hparams_gguf(path, key, value)  # type: ignore[misc]

# Prints the kind of the error, its message and hint, each on a line; a line break in one of them would show.
CHILD = """
import sys
from actqkv_cpp import ActqkvError, Llama
try:
    Llama(sys.argv[1], verbose=False, n_threads=1)
except ActqkvError as error:
    print(type(error).__name__, error, error.hint, sep="\\n")
"""


@pytest.mark.parametrize("kind", BAD)
def test_bad_model(kind: str, tmp_path: Path) -> None:
    """Breaks when this file kills the process, is loaded, or is refused without a reason."""
    path = tmp_path / "model.gguf"
    BAD[kind](path)
    child = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=False)
    assert child.returncode == 0, f"status {child.returncode}: {child.stderr[-2000:]}"
    name, message, hint, *rest = child.stdout.splitlines()
    assert (name, rest) == ("ModelError", [])
    assert "model.gguf" in message
    assert hint != "None"


def test_unreadable(tmp_path: Path) -> None:
    """Breaks when a permission error is an unexplained one."""
    path = tiny_gguf.make_not_gguf(tmp_path / "model.gguf")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(ModelError, match="Permission denied"):
        Llama(path)


@pytest.mark.parametrize("make", [tiny_gguf.make_moe_gguf, tiny_gguf.make_gemma_gguf])
def test_model_that_our_graph_lacks(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Breaks when a model of another architecture is refused, or runs densely without a notice."""
    path = make(tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match="through llama.cpp") as caught:
        llm = Llama(path, n_ctx=512, verbose=False, n_threads=1)
    assert len(caught) == 1
    assert (llm.engine, llm.n_ctx()) == ("llama.cpp", 512)
    assert "\n" not in (llm.engine_reason or "\n")
    answer = llm.read(text="the key was found in the river").ask("where is the key", max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    assert answer.sources == ()
    chat = llm.chat(system="the book")
    chat.say("where is the key", max_tokens=3)
    chat.say("who", max_tokens=3)
    assert len(chat.messages) == 4
    llm.close()


def test_model_that_cannot_go_back(tmp_path: Path) -> None:
    """Breaks when the second question about a document fails with a recurrent model, or sees the first."""
    path = tiny_gguf.make_mamba_gguf(tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match="'mamba' is not one of"):
        llm = Llama(path, n_ctx=512, verbose=False, n_threads=1)
    text = "the key of the house was found in the green river " * 4
    answers = [doc.ask("where is the key", max_tokens=8).text for doc in [llm.read(text=text)] for _ in range(2)]
    answers.append(llm.read(text=text).ask("where is the key", max_tokens=8).text)
    assert len(set(answers)) == 1
    chat = llm.chat(llm.read(text=text))
    chat.say("where is the key", max_tokens=3)
    chat.undo()
    assert answers[0].startswith(chat.say("where is the key", max_tokens=3).text)
    llm.close()


def test_split_model(tmp_path: Path) -> None:
    """Breaks when a model in several files does not load by its first."""
    path = tiny_gguf.make_tiny_gguf(tmp_path / "model.gguf", split_max_tensors=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = Llama(path, verbose=False, n_threads=1)
    assert llm.engine == "actqkv"
    llm.close()


def test_context_larger_than_memory(tiny_model: Path) -> None:
    """Breaks when a session that cannot fit is allocated, or refused without its plan."""
    with pytest.raises(MemoryPlanError, match="bytes") as caught:
        Llama(tiny_model, n_ctx="1000m", verbose=False, n_threads=1)
    assert "n_ctx=" in (caught.value.hint or "")


def test_wrong_values_name_both(tiny_model: Path) -> None:
    """Breaks when contradicting sizes are refused without the sizes."""
    with pytest.raises(ActqkvError, match="700"):
        Llama(tiny_model, verbose=False, retrieval=Retrieval(budget=600, n_sink=100, n_local=568, chunk=32))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Breaks when such a name ends in a UnicodeEncodeError out of llama_cpp."""
    path = tiny_gguf.make_tiny_gguf(tmp_path / "model.gguf").rename(tmp_path / os.fsdecode(b"m\xff.gguf"))
    with pytest.raises(ModelError, match=r"m\\udcff\.gguf' is not UTF-8"):
        Llama(path)
