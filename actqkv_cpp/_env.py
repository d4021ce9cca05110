"""The only reader of the environment.

ACTQKV_CACHE_DIR       where verdicts about this machine are remembered; default XDG_CACHE_HOME/actqkv, ~/.cache/actqkv
ACTQKV_CUDA_LIBRARY    the libactqkv_cuda to load; default the one installed beside this package
ACTQKV_DATA_DIR        where saved chats are kept; default XDG_DATA_HOME/actqkv, ~/.local/share/actqkv
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
    process then starves a step. Tokens/s of decode, S160 on 2 cores: alone 236 by default, 207 to 233 with a spin count
    of 1000, 111 with OMP_WAIT_POLICY=passive; beside one process at low priority 1 by default, 14 with a count of
    10000, 123 with 100, 132 when passive.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cache_dir() -> Path:
    """The folder for small things worth remembering between runs; may not exist yet."""
    if own := os.environ.get("ACTQKV_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "actqkv"


def cuda_library() -> Path | None:
    """The libactqkv_cuda that the user names; None: the installed one."""
    named = os.environ.get("ACTQKV_CUDA_LIBRARY")
    return Path(named) if named else None


def data_dir() -> Path:
    """The folder for what the user asked to keep; may not exist yet."""
    if own := os.environ.get("ACTQKV_DATA_DIR"):
        return Path(own)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "actqkv"


def extra_buffers() -> ExtraBuffers:
    """The user's word on extra buffer types.

    Raises:
        ParameterError: ACTQKV_EXTRA_BUFFERS is set to something else than auto, on or off.
    """
    value = os.environ.get("ACTQKV_EXTRA_BUFFERS", "auto").lower()
    if value not in get_args(ExtraBuffers):
        raise unknown_name("value of ACTQKV_EXTRA_BUFFERS", value, get_args(ExtraBuffers))
    return cast(ExtraBuffers, value)
