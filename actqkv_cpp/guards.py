"""Looks at arguments before libllama does, where it would end the process on them. modelfile.py does so for files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from actqkv_cpp.errors import ParameterError


def check_tokens(tokens: Iterable[int], n_vocab: int) -> None:
    """ParameterError where a token is none of the vocabulary's."""
    for i, token in enumerate(tokens):
        if not 0 <= token < n_vocab:
            raise ParameterError(f"token {i} is {token}, expected 0 to {n_vocab - 1}")


def check_grammar(model: Any, grammar: LlamaGrammar) -> None:
    """ParameterError where a grammar does not parse: the base hands on the null pointer that comes of it."""
    text, root = (part.encode() for part in (grammar._grammar, grammar._root))
    sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, text, root)
    if not sampler:
        raise ParameterError(f"the grammar does not parse, or has no rule {grammar._root!r}", "it is written in GBNF")
    llama_cpp.llama_sampler_free(sampler)
