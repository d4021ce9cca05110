"""What this machine can do: whether llama.cpp's extra buffer types work here, and how much memory is free.

Built by gcc 12 on a CPU with AMX, llama-cpp-python 0.3.36 dies by a signal on quantised models as soon as ggml repacks
weights into its AMX buffers: that compiler drops stores to the tile configuration. No input may kill Python, so a child
process tries the extra buffer types once, and the verdict is remembered per library file and CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actqkv_cpp import _env
from actqkv_cpp.errors import MemoryPlanError
from actqkv_cpp.figures import MemoryPlan

_CHILD_TIMEOUT_S = 60.0  # it takes about one second; a child that hangs is as bad as one that dies
_CHILD = "import sys; sys.path[:0] = {path!r}; from actqkv_cpp import _native; _native.try_extra_buffers()"
_VERDICT_FILE = "extra_buffers.json"
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Verdict:
    """Whether extra buffer types are safe here, and the one-line reason."""

    safe: bool
    reason: str


def extra_buffers() -> Verdict:
    """Whether models may be loaded with `use_extra_bufts` here; tries it in a child process the first time.

    ACTQKV_EXTRA_BUFFERS=on or off decides without trying. A verdict that cannot be written is tried again next time.

    Example:
        >>> extra_buffers().safe
        True
    """
    wish = _env.extra_buffers()
    if wish != "auto":
        return Verdict(wish == "on", f"ACTQKV_EXTRA_BUFFERS={wish}")
    key = _machine_key()
    file = _env.cache_dir() / _VERDICT_FILE
    remembered = _read_verdicts(file)
    if key in remembered:
        return remembered[key]
    verdict = try_child([sys.executable, "-c", _CHILD.format(path=sys.path)] if sys.executable else [])
    _write_verdicts(file, remembered | {key: verdict})
    return verdict


def try_child(command: Sequence[str], *, timeout_s: float = _CHILD_TIMEOUT_S) -> Verdict:
    """Verdict of the child process `command`: safe when it exits with 0; by signal, status or time it is not."""
    if not command:
        return Verdict(False, "no Python executable to try them with")
    try:
        child = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the trial did not end within {timeout_s:g} s")
    except OSError as error:
        return Verdict(False, f"the trial could not start: {error}")
    if child.returncode == 0:
        return Verdict(True, "tried: results agree with plain buffers")
    if child.returncode < 0:
        return Verdict(False, f"the trial was killed by signal {-child.returncode}: this build of ggml crashes here")
    last = child.stderr.decode("utf-8", "replace").strip().splitlines()
    return Verdict(False, last[-1] if last else f"the trial ended with status {child.returncode}")


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, cgroup limits included; None where unknown."""
    found = [_meminfo_available(), _cgroup_available()]
    return min((n_bytes for n_bytes in found if n_bytes is not None), default=None)


def check_memory(plan: MemoryPlan, n_ctx: int, *, n_in_file: int = 0) -> None:
    """MemoryPlanError where a session of `n_ctx` tokens needs more memory than there is.

    Args:
        n_in_file: tokens whose keys and values go to a KV file; only those between two checkpoints take memory.
    """
    free, needed = available_memory(), plan.needed_bytes(n_ctx, n_in_file=n_in_file)
    if free is None or needed <= free:
        return
    where, remedies = (" in a file", "a smaller kv_type") if n_in_file else ("", "a smaller kv_type, or a kv_file")
    raise MemoryPlanError(
        f"a session of {n_ctx} tokens needs {needed:,} bytes ({plan.kv_bytes:,} of KV{where}, "
        f"{plan.summary_bytes:,} of summaries), {free:,} are free",
        f"use n_ctx={n_ctx * free // needed // 1024 * 1024} or less, or {remedies}",
    )


def _meminfo_available() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):  # macOS has neither file; free pages are all it tells simply
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_available() -> int | None:
    """What cgroup v2 leaves to this process; its page cache counts as free, since the kernel gives it back."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit = int((root / "memory.max").read_text())  # "max" is a ValueError: no limit
        used = int((root / "memory.current").read_text())
        for line in (root / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return max(limit - used, 0)
    return None


def _machine_key() -> str:
    """Changes with the library files and with the CPU, so that a verdict never outlives what it was about."""
    import llama_cpp  # noqa: PLC0415 (heavy)

    parts: list[str] = [_cpu_flags()]
    for folder in (Path(llama_cpp.__file__).parent / "lib", Path(__file__).parent):
        for file in sorted([*folder.glob("libggml-cpu*"), *folder.glob("libactqkv*")]):
            found = file.stat()
            parts.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cpu_flags() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _read_verdicts(file: Path) -> dict[str, Verdict]:
    try:
        found: Any = json.loads(file.read_text())
        return {key: Verdict(bool(value["safe"]), str(value["reason"])) for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_verdicts(file: Path, verdicts: dict[str, Verdict]) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({key: asdict(verdict) for key, verdict in verdicts.items()}, indent=1))
        part.replace(file)


def available_cores() -> int:
    """Cores that this process may use. Hardware threads of one core share its units and count once; where the system
    does not tell which share one, each counts."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return os.cpu_count() or 1
    cpus = affinity(0)
    try:  # the same list stands beside every hardware thread of a core
        return len({(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
    except OSError:
        return len(cpus)
