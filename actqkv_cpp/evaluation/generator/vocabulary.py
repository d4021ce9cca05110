"""The tokenizer inside a GGUF file, to fit documents to a length."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import llama_cpp


class Vocabulary:
    """The tokenizer of the GGUF file at `path`; the weights are not read.

    Raises:
        ValueError: there is no such file, or it is no GGUF.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what Llama(verbose=False) does
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"{path}: expected a GGUF file")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS; control symbols in it are taken as plain text."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 1))()
        n_ids = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:n_ids])
