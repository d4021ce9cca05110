"""The files on disk that documents were read from: whether one has changed since."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from actqkv_cpp.files import file_hash

HASH_CHARS = 16  # of digests in messages


@dataclass(frozen=True)
class Origin:
    """A file as it was when it was read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path, found: os.stat_result, data: bytes) -> Origin | None:
        """Of what was read from a path; None where that was no file, but a pipe.

        Args:
            found: of the open file, before `data` was read from it.
        """
        if not stat.S_ISREG(found.st_mode):
            return None
        name = str(Path(path).resolve())
        return cls(name, found.st_size, found.st_mtime_ns, hashlib.sha256(data).hexdigest())

    def change(self) -> str | None:
        """What has become of the file since, both digests said; None where it is the same, or gone."""
        try:
            found = Path(self.path).stat()
            if (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns) or not stat.S_ISREG(found.st_mode):
                return None
            now = file_hash(self.path)
        except (OSError, ValueError):
            return None
        if now == self.sha256:
            return None
        return f"{self.path} has changed: sha256 {self.sha256[:HASH_CHARS]} then, {now[:HASH_CHARS]} now"
