"""The tokenizer: SentencePiece BPE with byte fallback, trained on generated text; and the prompt format on top of it.

Numbers are no matter of training. They fall into groups of three digits from the left, the rest being a group of one or
two: a model copies 1000 kinds of groups more surely than ten kinds of digits, among which every look that goes slightly
astray finds a wrong one. Hexadecimal falls into pairs of a digit and a letter in the same way. What a number is cut
into depends on the number alone, so it is the same tokens wherever it stands.

A conversation is  <s><|document|> {document}<|end|><|user|> {question}<|end|><|assistant|> {answer}<|end|>
where each text is written with the space before it, because the tokenizer adds none.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actqkv_cpp.evaluation.generator.documents import make_document
from actqkv_cpp.files import written_atomically
from models.recipe import TokenizerConfig

if TYPE_CHECKING:
    import gguf

UNKNOWN, BOS, EOS, USER, ASSISTANT, END, DOCUMENT = range(7)
CONTROL_SYMBOLS = ("<|user|>", "<|assistant|>", "<|end|>", "<|document|>")  # of the ids USER to DOCUMENT
FIRST_TEXT_ID = DOCUMENT + 1 + 256  # after the control symbols come the 256 bytes, then pieces of text

# score -> pieces: above every trained piece, so merged first, from the left, three digits before the next two
NUMBER_PIECES = {
    2.0: [a + b for a, b in product("0123456789", repeat=2)],
    1.0: [a + b for a, b in product("0123456789abcdef", repeat=2) if a.isdigit() != b.isdigit()],
    3.0: ["".join(digits) for digits in product("0123456789", repeat=3)],
}
N_NUMBER_PIECES = sum(map(len, NUMBER_PIECES.values()))

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|> ' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|> ' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|document|> ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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
        vocab_size=config.n_vocab - N_NUMBER_PIECES,
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
        temporary.write_bytes(_with_number_pieces(model.getvalue()))


def _with_number_pieces(model: bytes) -> bytes:
    """A SentencePiece model file with `NUMBER_PIECES` after its own pieces."""
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415 (optional)

    messages: Any = sentencepiece_model_pb2  # made at run time
    extended = messages.ModelProto.FromString(model)
    for score, pieces in NUMBER_PIECES.items():
        for piece in pieces:
            extended.pieces.add(piece=piece, score=score)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    serialised: bytes = extended.SerializeToString(deterministic=True)
    return serialised


def load(path: Path) -> Any:
    """The `sentencepiece.SentencePieceProcessor` of a file that `train` wrote.

    Raises:
        ImportError: sentencepiece is not installed.
    """
    return _sentencepiece().SentencePieceProcessor(model_file=str(path))


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
