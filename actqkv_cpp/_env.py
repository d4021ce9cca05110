"""The only reader of the environment.

ACTQKV_CACHE_DIR       where verdicts about this machine are remembered; default XDG_CACHE_HOME/actqkv, ~/.cache/actqkv
ACTQKV_EXTRA_BUFFERS   auto (default): llama.cpp's extra buffer types where they were tried and found safe; on; off
GOMP_SPINCOUNT         1000 unless it or OMP_WAIT_POLICY is set: see let_threads_sleep
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from actqkv_cpp.errors import unknown_name

ExtraBuffers = Literal["auto", "on", "off"]


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep after a short wait, unless the user chose otherwise. Call before llama.cpp is loaded.

    By default GNU's OpenMP spins for milliseconds at every barrier. With as many threads as cores, one other busy
    process then starves a step. Tokens/s of decode, S160 on 2 cores, alone and beside one process at low priority:
    default 236 and 1, spin count 1000 220 and over 70, OMP_WAIT_POLICY=passive 111 and 130.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
