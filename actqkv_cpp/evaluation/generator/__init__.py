"""Long documents with planted facts, and the questions about them, from a seed.

    python -m actqkv_cpp.evaluation.generator --help

One generator serves the evaluation's facts suite, the training of the bundled model (`models/`) and the examples.
"""

from actqkv_cpp.evaluation.generator.documents import Document, Question, make_document

__all__ = ["Document", "Question", "make_document"]
