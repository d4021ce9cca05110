"""What the engine did for one question about documents: bias over the text, chunks of every layer and step, recalls."""

from __future__ import annotations

from actqkv_cpp.inspection.inspection import Anchor, Inspection, Passage, Step
from actqkv_cpp.inspection.page import render

__all__ = ["Anchor", "Inspection", "Passage", "Step", "render"]
