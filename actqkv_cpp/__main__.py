"""`python -m actqkv_cpp` is `actqkv`."""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130  # as cli/_errors.py has it, whose import this must not need


def main() -> None:
    """Entry point of the `actqkv` script. Exit status: 0, 1 failed, 2 usage, 130 interrupted.

    Ctrl-C while the commands' modules load, for half a second, ends as quietly as it does later.
    """
    _open_streams()
    try:
        from actqkv_cpp.cli import app  # noqa: PLC0415 (see above)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    app(prog_name="actqkv")


def _open_streams() -> None:
    """Standard streams that the caller closed (`>&-`) lead nowhere, and the files opened next do not get their numbers:
    what a library prints would go into them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the process)


if __name__ == "__main__":
    main()
