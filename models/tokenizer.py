"""The tokenizer: SentencePiece BPE with byte fallback, trained on generated text; and the prompt format on top of it.

A conversation is  <s><|document|> {document}<|end|><|user|> {question}<|end|><|assistant|> {answer}<|end|>
where each text is written with the space before it, because the tokenizer adds none.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from models.files import written_atomically
from models.generate import make_document

if TYPE_CHECKING:
    import gguf

SHIPPED_GGUF: Final = Path(__file__).parents[1] / "actqkv_cpp" / "data" / "needle-q8_0.gguf"

UNKNOWN, BOS, EOS, USER, ASSISTANT, END, DOCUMENT = range(7)
CONTROL_SYMBOLS = ("<|user|>", "<|assistant|>", "<|end|>", "<|document|>")  # of the ids USER to DOCUMENT
FIRST_TEXT_ID = DOCUMENT + 1 + 256  # after the control symbols come the 256 bytes, then pieces of text

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|> ' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|> ' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|document|> ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerConfig:
    """Size of the vocabulary, and the generated text it is learnt from."""

    n_vocab: int = 2048
    n_documents: int = 900
    n_document_tokens: int = 1500


def train(path: Path, *, config: TokenizerConfig) -> None:
    """Train a tokenizer and write it to `path`, a SentencePiece model; equal configurations give equal files.

    Raises:
        ImportError: sentencepiece is not installed.
    """
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(config),
        model_writer=model,
        model_type="bpe",
        vocab_size=config.n_vocab,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.9999,
        required_chars="".join(map(chr, range(33, 127))),
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        control_symbols=list(CONTROL_SYMBOLS),
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=1,
    )
    with written_atomically(path) as temporary:
        temporary.write_bytes(model.getvalue())


def load(path: Path) -> Any:
    """The `sentencepiece.SentencePieceProcessor` of a file that `train` wrote.

    Raises:
        ImportError: sentencepiece is not installed.
    """
    return _sentencepiece().SentencePieceProcessor(model_file=str(path))


class GgufTokenizer:
    """The tokenizer inside a GGUF, through llama-cpp-python; the weights are not read.

    Raises:
        ImportError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import llama_cpp  # noqa: PLC0415 (optional)
        except ImportError as error:
            raise ImportError("the tokenizer of a GGUF needs llama-cpp-python") from error
        self._llama_cpp: Any = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what Llama(verbose=False) does
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"{path}: expected a GGUF file")
        self._vocab = self._llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS; control symbols in it are taken as plain text."""
        data = text.encode()
        ids = (self._llama_cpp.llama_token * (len(data) + 1))()
        n_ids = self._llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:n_ids])


def _corpus(config: TokenizerConfig) -> Iterator[str]:
    """Lines of documents, sparse and dense, with their questions and answers."""
    densities = (0.15, 0.4, 0.8)
    for index in range(config.n_documents):
        document = make_document(
            config.n_document_tokens, seed=f"tok{index}", density=densities[index % len(densities)]
        )
        yield from (line for line in document.text.split("\n") if line)
        for question in document.questions:
            yield f" {question.question}"
            yield f" {question.answer}"


def _sentencepiece() -> Any:
    try:
        import sentencepiece  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise ImportError("training needs sentencepiece: install the extra actqkv[train]") from error
    return sentencepiece


def add_prompt_format(writer: gguf.GGUFWriter) -> None:
    """Writes the kind of tokenizer, its special tokens and the chat template; the vocabulary is the caller's."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
