"""An inspection as one HTML page that needs no network."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from actqkv_cpp.inspection.inspection import Inspection, Step, plain
from actqkv_cpp.recording import Record

MARK = "actqkv inspect"  # how a page of ours is known
_TEMPLATE = Path(__file__).with_name("page.html")
_SLOT = "/*DATA*/null"
_BIAS_STEPS = 24  # of a byte, per doubling of the bias: 128 is an average token, 0 an unknown one


def render(inspection: Inspection) -> str:
    """The page: text shaded by bias or by how often it was attended, layers, steps."""
    data = json.dumps(_data(inspection), ensure_ascii=False, separators=(",", ":"))
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f"<!-- {MARK} -->\n{_TEMPLATE.read_text(encoding='utf-8').replace(_SLOT, safe)}"


def _data(inspection: Inspection) -> dict[str, Any]:
    recording = inspection.recording
    return {
        "model": inspection.model,
        "method": inspection.method,
        "question": inspection.answer.question,
        "answer": inspection.answer.text,
        "usage": inspection.answer.usage.to_json(),
        "parameters": inspection.parameters,
        "nSink": recording.n_sink,
        "chunk": recording.n_chunk_tokens,
        "nLayer": recording.n_layer,
        "choosing": inspection.choosing,
        "nChunks": inspection.attended.shape[1],
        "documents": [
            {"name": doc.name, "text": doc.text, "start": doc.start, "sizes": np.diff(doc.ends, prepend=0).tolist()}
            for doc in inspection.documents
        ],
        "bias": [_bytes(layer) for layer in inspection.bias] if inspection.has_bias else None,
        "layers": inspection.layers(),
        "steps": [_step(step) for step in inspection.steps],
    }


def _bytes(bias: Any) -> str:
    """Bias of all tokens as base64 of a byte each, on a logarithmic scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.clip(128 + _BIAS_STEPS * np.log2(bias), 1, 255)
    return base64.b64encode(np.where(np.isfinite(bias), scaled, 0).astype(np.uint8).tobytes()).decode("ascii")


def _step(step: Step) -> dict[str, Any]:
    return {"token": step.token, "nPast": step.n_past, "layers": [_layer(record) for record in step.layers]}


def _layer(record: Record) -> dict[str, Any]:
    """Chunks as ids; `w` says which share of the KV heads chose each, where not all of them did."""
    share = record.chosen_mask().mean(axis=0)
    ids = np.flatnonzero(share)
    found = {
        "k": record.n_chosen,
        "e": plain(record.entropy),
        "r": plain(record.mass_recall),
        "o": plain(record.chunk_recall),
        "c": None if record.chosen is None else ids.tolist(),
        "n": record.n_chunks,
    }
    return found if (share[ids] == 1).all() else found | {"w": np.round(share[ids], 3).tolist()}
