"""The only reader of the environment.

ACTQKV_CACHE_DIR       where verdicts about this machine are remembered; default XDG_CACHE_HOME/actqkv, ~/.cache/actqkv
ACTQKV_EXTRA_BUFFERS   auto (default): llama.cpp's extra buffer types where they were tried and found safe; on; off
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from actqkv_cpp.errors import unknown_name

ExtraBuffers = Literal["auto", "on", "off"]


def cache_dir() -> Path:
    """The folder for small things worth remembering between runs; may not exist yet."""
    if own := os.environ.get("ACTQKV_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "actqkv"


def extra_buffers() -> ExtraBuffers:
    """The user's word on extra buffer types.

    Raises:
        ParameterError: ACTQKV_EXTRA_BUFFERS is set to something else than auto, on or off.
    """
    value = os.environ.get("ACTQKV_EXTRA_BUFFERS", "auto").lower()
    if value not in get_args(ExtraBuffers):
        raise unknown_name("value of ACTQKV_EXTRA_BUFFERS", value, get_args(ExtraBuffers))
    return cast(ExtraBuffers, value)
