"""Breaks when llama_cpp.Llama uses its context in a place that our session does not stand in for (a new version)."""

from __future__ import annotations

import ast
import inspect

import llama_cpp.llama
import llama_cpp.llama_chat_format
import pytest

from actqkv_cpp.context import SessionContext
from actqkv_cpp.llama import Llama

# Methods of the base that may touch what SessionContext lacks, or the raw pointer, and why that is right.
ALLOWED = {
    "__init__": "runs before the session is put in place",
    "ctx": "the base's own, empty context",
    "embed": "raises before it touches the context, unless embedding=True, which runs densely",
    "_create_completion": "llama_n_ctx in the text of an error, which we replace",
    "reset": "the raw pointer only for recurrent models, which our graph refuses",
}
OVERRIDDEN = {name for name in vars(Llama) if name in vars(llama_cpp.llama.Llama)}


def _uses() -> list[tuple[str, str]]:
    """(method, what) for every use of self._ctx and self.ctx in llama_cpp.Llama; `what` is the member, "" for bare."""
    found: list[tuple[str, str]] = []
    (cls,) = ast.parse(inspect.getsource(llama_cpp.llama.Llama)).body
    for method in ast.iter_child_nodes(cls):
        if not isinstance(method, ast.FunctionDef):
            continue
        for node in ast.walk(method):
            if not (isinstance(node, ast.Attribute) and node.attr in {"_ctx", "ctx"}):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                continue
            members = [n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.value is node]
            found.append((method.name, "ctx" if node.attr == "ctx" else members[0] if members else ""))
    return sorted(set(found))


USES = _uses()


def test_the_walk_finds_something() -> None:
    """Breaks when the base renames its context and this file would pass on nothing."""
    assert ("generate", "kv_cache_seq_rm") in USES
    assert ("_create_completion", "ctx") in USES
    assert len(USES) > 10


@pytest.mark.parametrize(("method", "what"), USES)
def test_every_use_is_covered(method: str, what: str) -> None:
    """Breaks when a use of the context reaches neither an override, nor SessionContext, nor a reason above."""
    served = what and what != "ctx" and hasattr(SessionContext, what)
    assert method in OVERRIDDEN or method in ALLOWED or served


def test_reasons_are_needed() -> None:
    """Breaks when a reason above outlives its use."""
    assert set(ALLOWED) <= {method for method, _ in USES}


def test_chat_formats_with_images_are_the_only_others() -> None:
    """Breaks when a chat format without images begins to write to the context."""
    tree = ast.parse(inspect.getsource(llama_cpp.llama_chat_format))
    users = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and ("._ctx" in ast.unparse(node) or "llama.ctx" in ast.unparse(node))
    }
    handlers = llama_cpp.llama_chat_format
    for name in users:
        kind = getattr(handlers, name)
        assert issubclass(kind, (handlers.Llava15ChatHandler, handlers.MTMDChatHandler)), name
